"""The method Relaxed OPD (REOPOLD, arXiv 2603.11137): a reward floor, later training on uncertain tokens only.

    R_{i,t} = A_{i,t},   R^ = max(R, floor),   J = (1 / sum M) sum_{i,t} w_{i,t} R^_{i,t} M_{i,t}
    phase 1 (step < switch)    M = 1 where R >= floor
    phase 2                    M = 1 on the ceil(beta T) of the batch's T response tokens with the largest entropy

The coefficients are therefore c_{i,t} = M_{i,t} / sum M, and A has a floor. Among tokens of equal entropy, earlier
samples and earlier tokens are kept first. Two forms of the floor are published: ``scaled-log`` is
log(lambda) / (1 - lambda), negative for every lambda in (0, 1), and ``logit`` is log(lambda / (1 - lambda)), negative
for lambda below one half.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_camopd.batch import ScoredBatch
from megatron_camopd.config.settings import Range, Settings, at_least, setting
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective.gap import log_prob_gap
from megatron_camopd.objective.method import PlainScoring, TrainingWeights
from megatron_camopd.schedule import BranchSpec


@dataclass(frozen=True, kw_only=True)
class RelaxedOPDSettings(Settings):
    """CaMOPD method relaxed-opd: reward floor, then uncertain tokens."""

    relaxed_opd_floor: Literal["scaled-log", "logit"] = setting("scaled-log", kept=True)
    """relaxed-opd: reward floor log(l)/(1-l), or log(l/(1-l))"""

    relaxed_opd_lambda: float = setting(0.1, kept=True)
    """relaxed-opd: l of the floor"""

    relaxed_opd_entropy_fraction: float = setting(0.2, within=Range(0, 1, open_low=True), kept=True, metavar="BETA")
    """relaxed-opd: share of tokens, the most uncertain, kept in phase 2"""

    relaxed_opd_switch_step: int | None = setting(None, within=at_least(0), kept=True, metavar="STEP")
    """relaxed-opd: first step of phase 2 (default: half of --train-iters)"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check the ranges, and let phase 2 begin at half of the steps if no step was given."""
        if args.relaxed_opd_switch_step is None:
            args.relaxed_opd_switch_step = max(args.train_iters, 0) // 2
        super().check(args, given)


def reward_floor(form: str, strength: float) -> float:
    """Return the reward floor in nats, a negative number.

    Args:
        form: "scaled-log" or "logit".
        strength: lambda.

    Raises:
        ConfigurationError: The floor of this lambda would not be negative and finite.
    """
    limit = {"scaled-log": 1.0, "logit": 0.5}[form]
    if not 0.0 < strength < limit:
        raise ConfigurationError(
            f"--relaxed-opd-lambda {strength}: must be above 0 and below {limit} with --relaxed-opd-floor {form}"
        )
    return math.log(strength) / (1 - strength) if form == "scaled-log" else math.log(strength / (1 - strength))


def top_entropy_tokens(entropies: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Return the most uncertain tokens: ceil(``fraction`` T) of the T tokens in ``mask``, by entropy.

    Args:
        entropies: [N, R] float, nats.
        mask: [N, R] bool, True on response tokens.
        fraction: beta in (0, 1].

    Returns:
        [N, R] bool, True on the tokens with the largest entropies.
    """
    places = mask.flatten().nonzero().flatten()
    order = torch.argsort(entropies.flatten()[places], descending=True, stable=True)
    kept = torch.zeros(mask.numel(), dtype=torch.bool)
    # Round before ceil: 0.2 x 15 is meant to be 3, but is a little more in binary floating point.
    kept[places[order[: math.ceil(round(fraction * len(places), 9))]]] = True
    return kept.view(mask.shape)


@dataclass(frozen=True)
class RelaxedOPD(PlainScoring):
    """The method Relaxed OPD.

    Attributes:
        floor: Reward floor, nats.
        entropy_fraction: beta, the share of tokens that phase 2 trains.
        switch_step: The first step of phase 2.
    """

    floor: float
    entropy_fraction: float
    switch_step: int

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
        """Give all kept tokens the same coefficient; the phase that ``step`` falls into decides which are kept."""
        mask = batch.response_mask
        reward = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
        if step < self.switch_step:
            kept = mask & (reward >= self.floor)
        else:
            assert batch.student_entropies is not None
            kept = top_entropy_tokens(batch.student_entropies, mask, self.entropy_fraction)
        count = int(kept.sum())
        coefficients = torch.zeros(mask.shape).masked_fill(kept, 1.0 / max(count, 1))
        metrics = {"kept_token_fraction": count / max(int(mask.sum()), 1)}
        return TrainingWeights(coefficients, kept.any(dim=1), self.floor, metrics)


def build(args: Namespace, branches: Sequence[BranchSpec]) -> RelaxedOPD:
    """Build the method from checked arguments.

    Raises:
        ConfigurationError: ``--relaxed-opd-lambda`` gives no negative floor.
    """
    settings = RelaxedOPDSettings.of(args)
    assert settings.relaxed_opd_switch_step is not None, "set by RelaxedOPDSettings.check"
    floor = reward_floor(settings.relaxed_opd_floor, settings.relaxed_opd_lambda)
    return RelaxedOPD(floor, settings.relaxed_opd_entropy_fraction, settings.relaxed_opd_switch_step)
