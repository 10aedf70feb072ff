"""Measures of how unevenly the gap is spread over the samples: Lorenz curve and Gini coefficient of their scores.

The scores are those by which selection ranks the samples (Eq. 4 and 5). If the curve lies far above the diagonal, few
samples carry most of the teacher's feedback and selection can leave out many.
"""

import torch
from torch import Tensor

POINTS = 21  # 0, 5, ..., 100 % of the samples


def lorenz_curve(scores: Tensor, points: int = POINTS) -> list[float | None]:
    """Return the share of the summed score that the top p of the samples carry, for evenly spaced p from 0 to 1.

    The curve is interpolated linearly between whole numbers of samples. If all scores are 0 it is the diagonal.

    Args:
        scores: [N] float, not negative, N at least 1.
        points: Number of values of p, 0 and 1 included.

    Returns:
        ``points`` values; all of them are None if a score is not finite.
    """
    if not torch.isfinite(scores).all():
        return [None] * points
    ordered = scores.double().sort(descending=True).values
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), _evenly_if_zero(ordered).cumsum(0)])
    shares = shares / shares[-1]
    curve: list[float | None] = []
    for point in range(points):
        whole, rest = divmod(point * len(scores), points - 1)
        fraction = rest / (points - 1)
        following = shares[min(whole + 1, len(scores))]
        curve.append(float(shares[whole] + fraction * (following - shares[whole])))
    return curve


def gini_coefficient(scores: Tensor) -> float:
    """Return the Gini coefficient sum_ij |s_i - s_j| / (2 N sum_i s_i).

    It is 0 if all scores are equal (all 0 included), 1 - 1/N if one sample has the whole sum, and NaN if a score is not
    finite.

    Args:
        scores: [N] float, not negative, N at least 1.
    """
    ordered = _evenly_if_zero(scores.double().sort().values)
    count = len(ordered)
    places = torch.arange(1, count + 1, dtype=torch.float64)
    return float(((2 * places - count - 1) * ordered).sum() / (count * ordered.sum()))


def _evenly_if_zero(scores: Tensor) -> Tensor:
    """Return ``scores``, or ones if all of them are 0."""
    return scores if bool((scores != 0).any()) else torch.ones_like(scores)
