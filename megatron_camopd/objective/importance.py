"""Importance weights between the policy being trained and the engine that sampled.

    rho_t = sg[ pi_theta(y_t | h_t) / mu(y_t | h_t) ]

    mask   w_t = rho_t if low <= rho_t <= high, else 0      (both limits belong to the interval)
    clip   w_t = min(rho_t, high)
    none   w_t = 1                                          (no correction)

The comparison is written so that a NaN ratio stays NaN: a broken model must show up in the loss, not be dropped as an
off-policy token.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_camopd.config.settings import Settings, setting
from megatron_camopd.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class ImportanceSettings(Settings):
    """CaMOPD importance weights: between the policy that is trained and the engine that sampled."""

    importance_correction: Literal["mask", "clip", "none"] = setting("mask", kept=True)
    """mask: weights outside [low, high] become 0; clip: at most high; none: 1"""

    importance_low: float = setting(0.5, kept=True)
    """lower bound of the importance weight"""

    importance_high: float = setting(5.0, kept=True)
    """upper bound of the importance weight"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check that the bounds are in order; the upper one may be infinite."""
        super().check(args, given)
        if not 0 <= args.importance_low <= args.importance_high:
            raise ConfigurationError(
                f"--importance-low {args.importance_low} and --importance-high {args.importance_high}: "
                "need 0 <= low <= high"
            )

    @property
    def weights(self) -> tuple[str, float, float]:
        """Mode and bounds, as :func:`importance_weights` and the output head take them."""
        return self.importance_correction, self.importance_low, self.importance_high


def importance_weights(
    train_logprobs: Tensor, rollout_logprobs: Tensor, mode: str = "mask", low: float = 0.5, high: float = 5.0
) -> Tensor:
    """Weights w_t as above, cut off from the graph.

    train_logprobs, rollout_logprobs: the same shape (usually [N, R]), float, nats. Returns that shape and the dtype of
    ``train_logprobs``. Raises ConfigurationError for an unknown mode or limits that are not 0 <= low <= high (``low``
    is read by mask alone), ValueError when shapes differ.
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
    """Return which of the ratios pi / mu the correction does not let through as they are.

    ratio: any shape, float. Returns that shape, bool: outside [low, high] with "mask", above high with "clip", none
    with "none". Raises ConfigurationError for an unknown mode.
    """
    _check_mode(mode)
    if mode == "none":
        return torch.zeros_like(ratio, dtype=torch.bool)
    above = ratio > high
    return above if mode == "clip" else above | (ratio < low)


def _check_mode(mode: str) -> None:
    if mode not in ("mask", "clip", "none"):
        raise ConfigurationError(f"--importance-correction is {mode!r}; it must be mask, clip or none")
