"""The method CaMOPD, and its ablations without selection (Eq. 4-7).

A step serves one branch b. Its samples are ranked by their gap scores; S_b is the set of the top-ranked samples that
carry the share ``mass_target`` of the summed score:

    --unselected-samples drop    c_{i,t} = r_b / (|S_b| L_i)  for i in S_b, else 0            CaMOPD
    --unselected-samples keep    c_{i,t} = r_i / (N L_i),  r_i = r_b for i in S_b, else 1     "w/o sel"

With ``keep`` and feedback scale 1 in both branches the selection has no effect: the paper's "w/o sel, w/o scale".
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_camopd.batch import ScoredBatch
from megatron_camopd.config.settings import Settings, setting
from megatron_camopd.objective.gap import log_prob_gap
from megatron_camopd.objective.method import PlainScoring, TrainingWeights, broadcast_to_tokens
from megatron_camopd.objective.scores import gap_scores
from megatron_camopd.objective.selection import select_by_gap_mass
from megatron_camopd.objective.weights import emphasized_coefficients, sample_coefficients
from megatron_camopd.schedule import BranchSpec


@dataclass(frozen=True, kw_only=True)
class CaMOPDSettings(Settings):
    """CaMOPD selection: which samples of a step are trained."""

    unselected_samples: Literal["drop", "keep"] = setting("drop", kept=True)
    """camopd: keep trains them too, with scale 1 (ablation)"""


@dataclass(frozen=True)
class CaMOPD(PlainScoring):
    """The method CaMOPD over a table of branches, of which a step serves one.

    Attributes:
        branches: The table; each branch has its score rule, its mass target rho_b and its feedback scale r_b.
        keep_unselected: Whether all samples are trained, those in S_b with the scale r_b and the others with 1.
    """

    branches: tuple[BranchSpec, ...]
    keep_unselected: bool = False

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
        """Rank the samples by their scores, select the top ones and compute the coefficients."""
        (served,) = batch.rows_by_branch()
        branch = self.branches[served]
        gap = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
        scores = gap_scores(gap, batch.response_mask, branch.score)
        selected = select_by_gap_mass(scores, branch.mass_target)
        rule = emphasized_coefficients if self.keep_unselected else sample_coefficients
        coefficients = rule(scores, selected, batch.rollout.response_lengths, branch.feedback_scale)
        return TrainingWeights(broadcast_to_tokens(coefficients, batch.response_mask), selected)


def build(args: Namespace, branches: Sequence[BranchSpec]) -> CaMOPD:
    """Build the method from checked arguments and the table of branches."""
    return CaMOPD(tuple(branches), keep_unselected=CaMOPDSettings.of(args).unselected_samples == "keep")
