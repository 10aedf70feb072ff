"""Importance weights that correct for sampling from the rollout engine's policy instead of the student's.

    rho_t = sg[ pi_theta(y_t | h_t) / mu(y_t | h_t) ]

    mask   w_t = rho_t if low <= rho_t <= high, else 0      (both bounds belong to the interval)
    clip   w_t = min(rho_t, high)
    none   w_t = 1                                          (no correction)

A NaN ratio stays NaN in every mode but ``none``: a broken model must show up in the loss instead of being dropped as
an off-policy token.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_camopd.config.settings import Settings, setting
from megatron_camopd.errors import ConfigurationError

ImportanceMode = Literal["mask", "clip", "none"]


@dataclass(frozen=True, kw_only=True)
class ImportanceSettings(Settings):
    """CaMOPD importance weights: between the policy that is trained and the engine that sampled."""

    importance_correction: ImportanceMode = setting("mask", kept=True)
    """mask: weights outside [low, high] become 0; clip: at most high; none: 1"""

    importance_low: float = setting(0.5, kept=True)
    """lower bound of the importance weight"""

    importance_high: float = setting(5.0, kept=True, may_be_infinite=True)
    """upper bound of the importance weight (inf: none)"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check that 0 <= low <= high; the upper bound may be infinite."""
        super().check(args, given)
        if not 0 <= args.importance_low <= args.importance_high:
            raise ConfigurationError(
                f"--importance-low {args.importance_low} and --importance-high {args.importance_high}: "
                "need 0 <= low <= high"
            )

    @property
    def weights(self) -> tuple[str, float, float]:
        """Mode, lower and upper bound, as :func:`importance_weights` and the output head take them."""
        return self.importance_correction, self.importance_low, self.importance_high


DEFAULT_IMPORTANCE = ImportanceSettings().weights
"""Mode, lower and upper bound where a caller passes none."""

_MODE, _LOW, _HIGH = DEFAULT_IMPORTANCE


def importance_weights(
    train_logprobs: Tensor, rollout_logprobs: Tensor, mode: str = _MODE, low: float = _LOW, high: float = _HIGH
) -> Tensor:
    """Return the weights w_t of the module's formulas, detached from the autograd graph.

    Args:
        train_logprobs: log pi_theta of the sampled tokens; any shape, usually [N, R], float, nats.
        rollout_logprobs: log mu of the same tokens; the same shape, float, nats.
        mode: "mask", "clip" or "none".
        low: Lower bound of the ratio; only "mask" reads it.
        high: Upper bound of the ratio; "none" does not read it.

    Returns:
        The weights in the shape and dtype of ``train_logprobs``.

    Raises:
        ConfigurationError: The mode is unknown, or the bounds that it reads are out of order or not positive.
        ValueError: The shapes differ.
    """
    if train_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(f"training {tuple(train_logprobs.shape)} and rollout {tuple(rollout_logprobs.shape)} differ")
    _check_mode(mode)
    if mode == "none":
        return torch.ones_like(train_logprobs, requires_grad=False)
    if not high > 0.0:
        raise ConfigurationError(f"--importance-high is {high}; it must be positive")
    ratio = torch.exp(train_logprobs.detach() - rollout_logprobs.detach())
    if mode == "clip":
        return ratio.clamp(max=high)
    if not 0.0 <= low <= high:
        raise ConfigurationError(f"--importance-low is {low}; it must lie between 0 and --importance-high ({high})")
    return ratio.masked_fill(outside_bounds(ratio, mode, low, high), 0.0)


def outside_bounds(ratio: Tensor, mode: str, low: float, high: float) -> Tensor:
    """Return which of the ratios pi / mu the correction changes.

    Args:
        ratio: Any shape, float.
        mode: "mask", "clip" or "none".
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.

    Returns:
        bool in the shape of ``ratio``: True outside [low, high] with "mask", above ``high`` with "clip", and False
        everywhere with "none". A NaN ratio gives False.

    Raises:
        ConfigurationError: The mode is unknown.
    """
    _check_mode(mode)
    if mode == "none":
        return torch.zeros_like(ratio, dtype=torch.bool)
    above = ratio > high
    return above if mode == "clip" else above | (ratio < low)


def _check_mode(mode: str) -> None:
    known = get_args(ImportanceMode)
    if mode not in known:
        raise ConfigurationError(f"--importance-correction is {mode!r}; it must be one of {', '.join(known)}")
