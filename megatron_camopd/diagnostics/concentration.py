"""How unevenly the gap is spread over the samples: Lorenz curve and Gini coefficient of their scores.

The scores are those that selection ranks by (Eq. 4 and 5). A curve far above the diagonal says that few samples carry
most of the teacher's feedback, so that selection can leave out many.
"""

import torch
from torch import Tensor

POINTS = 21  # 0, 5, ..., 100 % of the samples


def lorenz_curve(scores: Tensor, points: int = POINTS) -> list[float | None]:
    """Share of the total that the top p of the samples carry, for ``points`` even steps of p from 0 to 1.

    scores: [N] float, not negative, N at least 1. Between whole numbers of samples the curve is straight. Scores that
    are all zero are spread evenly: the diagonal. Where a score is not finite, every value is None.
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
    """sum_ij |s_i - s_j| / (2 N sum_i s_i): 0 if all are equal (zero included), 1 - 1/N if one has everything.

    scores: as for :func:`lorenz_curve`. NaN where a score is not finite.
    """
    ordered = _evenly_if_zero(scores.double().sort().values)
    count = len(ordered)
    places = torch.arange(1, count + 1, dtype=torch.float64)
    return float(((2 * places - count - 1) * ordered).sum() / (count * ordered.sum()))


def _evenly_if_zero(scores: Tensor) -> Tensor:
    return scores if bool((scores != 0).any()) else torch.ones_like(scores)
