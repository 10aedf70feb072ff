"""Selection of the samples that carry a given share of the total gap (Eq. 6).

    sort by s descending;  k = min{ k : sum_{j<=k} s_(j) >= rho * sum_j s_(j) };  S = the first k samples

Every rank and every restart must pick the same set, so the sort is stable (ties go by index), sums are float64, one
after the other, on the CPU (a parallel scan on an accelerator may round otherwise), and the total is the last
cumulative sum.
"""

import torch
from torch import Tensor

from megatron_camopd.errors import ConfigurationError


def select_by_gap_mass(scores: Tensor, mass_target: float) -> Tensor:
    """Eq. 6: the smallest set of top-scored samples that covers ``mass_target`` of the summed score.

    scores: [N] float, finite and not negative, of the whole global batch (not of one rank).
    mass_target: rho in (0, 1]. At 1 exactly the samples with a positive score are kept, also those too small to change
    the rounded sum. When every score is 0 every sample is kept (:func:`sample_coefficients` then gives each weight 0).
    Returns [N] bool on the device of ``scores``.
    Raises ConfigurationError for rho outside (0, 1], ValueError for a score that is NaN, infinite or negative.
    """
    if not 0.0 < mass_target <= 1.0:
        raise ConfigurationError(
            f"mass target (--general-mass-target, --domain-mass-target) is {mass_target}; it must lie in (0, 1]"
        )
    if scores.dim() != 1:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; one score a sample, [N], is expected")
    values = scores.detach().to(device="cpu", dtype=torch.float64)
    bad = ~(torch.isfinite(values) & (values >= 0.0))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"score of sample {first} is {values[first].item()}; scores are finite and not negative")

    positive = values > 0.0
    if not positive.any():
        selected = torch.ones_like(positive)
    elif mass_target == 1.0:
        selected = positive
    else:
        order = torch.argsort(values, descending=True, stable=True)
        mass = torch.cumsum(values[order], dim=0)
        # The first place whose cumulative sum reaches the target; the last place always does, as mass_target < 1.
        count = int(torch.searchsorted(mass, mass_target * mass[-1:], side="left")) + 1
        selected = torch.zeros_like(positive)
        selected[order[:count]] = True
    return selected.to(scores.device)
