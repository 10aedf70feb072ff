"""Selection of the samples that carry a given share of the summed score (Eq. 6).

    sort by s descending;  k = min{ k : sum_{j<=k} s_(j) >= rho * sum_j s_(j) };  S = the first k samples

Every rank and every restart must select the same set. The sort is therefore stable (of equal scores, the lower index
comes first), sums run in float64, sequentially, on the CPU (a parallel scan on an accelerator may round differently),
and the total is the last cumulative sum.
"""

import torch
from torch import Tensor

from megatron_camopd.errors import ConfigurationError


def select_by_gap_mass(scores: Tensor, mass_target: float) -> Tensor:
    """Return the smallest set of top-scored samples that covers ``mass_target`` of the summed score (Eq. 6).

    With ``mass_target`` 1, exactly the samples with a positive score are selected, also those too small to change the
    rounded sum. If all scores are 0, all samples are selected, and :func:`sample_coefficients` gives each the
    coefficient 0.

    Args:
        scores: [N] float, finite and not negative, of the whole global batch (not of one rank).
        mass_target: rho in (0, 1].

    Returns:
        [N] bool on the device of ``scores``.

    Raises:
        ConfigurationError: rho lies outside (0, 1].
        ValueError: A score is NaN, infinite or negative, or ``scores`` is not one-dimensional.
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
        # The last cumulative sum always reaches the target, because mass_target < 1.
        count = int(torch.searchsorted(mass, mass_target * mass[-1:], side="left")) + 1
        selected = torch.zeros_like(positive)
        selected[order[:count]] = True
    return selected.to(scores.device)
