"""CaMOPD, and its ablations without selection (Eq. 4-7).

A step serves one branch; its samples are ranked by their gap, those that carry ``mass_target`` of it are S_b:

    --unselected-samples drop    c_{i,t} = r_b / (|S_b| L_i)  for i in S_b, else 0            CaMOPD
    --unselected-samples keep    c_{i,t} = r_i / (N L_i),  r_i = r_b for i in S_b, else 1     "w/o sel"

With ``keep`` and both scales 1 nothing depends on the selection: "w/o sel, w/o scale".
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_camopd.batch import Branch, ScoredBatch
from megatron_camopd.config.branch_settings import AlternatingSettings
from megatron_camopd.config.settings import Settings, setting
from megatron_camopd.objective.gap import log_prob_gap
from megatron_camopd.objective.method import Composition, PlainScoring, TrainingWeights, spread
from megatron_camopd.objective.scores import gap_scores
from megatron_camopd.objective.selection import select_by_gap_mass
from megatron_camopd.objective.weights import emphasized_coefficients, sample_coefficients


@dataclass(frozen=True, kw_only=True)
class CaMOPDSettings(Settings):
    """CaMOPD selection: which samples of a step are trained."""

    unselected_samples: Literal["drop", "keep"] = setting("drop", kept=True)
    """camopd: keep trains them too, with scale 1 (ablation)"""


@dataclass(frozen=True)
class CaMOPD(PlainScoring):
    """``mass_target``: rho_b; ``feedback_scale``: r_b; ``keep_unselected``: train all samples, S_b with r_b."""

    mass_target: Mapping[Branch, float]
    feedback_scale: Mapping[Branch, float]
    keep_unselected: bool = False

    def weigh(self, batch: ScoredBatch, composition: Composition, step: int) -> TrainingWeights:
        (branch,) = composition
        gap = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
        scores = gap_scores(gap, batch.response_mask, branch)
        selected = select_by_gap_mass(scores, self.mass_target[branch])
        rule = emphasized_coefficients if self.keep_unselected else sample_coefficients
        coefficients = rule(scores, selected, batch.rollout.response_lengths, self.feedback_scale[branch])
        return TrainingWeights(spread(coefficients, batch.response_mask), selected)


def build(args: Namespace) -> CaMOPD:
    """Build the method from checked arguments."""
    branches = AlternatingSettings.of(args)
    return CaMOPD(
        {Branch.GENERAL: branches.general_mass_target, Branch.DOMAIN: branches.domain_mass_target},
        {Branch.GENERAL: branches.general_feedback_scale, Branch.DOMAIN: branches.domain_feedback_scale},
        keep_unselected=CaMOPDSettings.of(args).unselected_samples == "keep",
    )
