"""How far gradients of samples agree, from their norms and the inner products of a few sums of them.

    Coh(A) = || sum_{i in A} g_i || / sum_{i in A} || g_i ||        1: all in one direction; 0: they cancel
    GCG    = (Coh(selected) - Coh(full)) / Coh(full) * 100 %        gradient coherence gain
    dot    = < mean_general g, mean_domain g >,  cosine = dot / (norms' product)    counteraction: negative

No vector is needed: with the samples divided into groups, || sum over groups ||^2 is a sum over the groups' matrix of
inner products. 0 / 0 is NaN: nothing can be said about the direction of gradients that are zero.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Samples of one branch, by its place in the run's table, whose gradients are summed up together.

    ``probe``: samples from outside of the batch, which stand for a branch that the batch does not serve.
    """

    branch: int
    selected: bool = True
    probe: bool = False


def evenly_spaced(count: int, total: int) -> Tensor:
    """``count`` different numbers below ``total`` at even distances: [count] int64, rising."""
    assert 1 <= count <= total, (count, total)
    return torch.arange(count) * total // count


def coherence(squared_norm_of_sum: float, norms: Tensor) -> float:
    """Coh of samples with ``norms`` [A] float64; NaN where there are none or all are zero."""
    return _ratio(math.sqrt(squared_norm_of_sum), float(norms.sum()))


def coherence_measures(groups: Sequence[Group], products: Tensor, norms: Tensor, selected: Tensor) -> dict[str, float]:
    """Coherence of all samples and of the selected ones, the gain in percent, and mean norms.

    products: [K, K] float64, inner products of the ``groups``' sums; norms: [M] float64 of the samples' gradients;
    selected: [M] bool.
    """
    everything = [0.0 if group.probe else 1.0 for group in groups]
    chosen = [float(group.selected and not group.probe) for group in groups]
    full = coherence(_product(everything, products, everything), norms)
    of_selected = coherence(_product(chosen, products, chosen), norms[selected])
    return {
        "coherence_full": full,
        "coherence_selected": of_selected,
        "gradient_coherence_gain": 100.0 * _ratio(of_selected - full, full),
        "sample_grad_norm_mean": float(norms.mean()),
        "sample_grad_norm_selected_mean": float(norms[selected].mean()),
    }


def branch_measures(
    groups: Sequence[Group], products: Tensor, counts: Mapping[int, int], names: Mapping[int, str]
) -> dict[str, float]:
    """Return the norms of the branches' mean gradients, and inner product and cosine of every pair.

    Args:
        groups: K groups of samples.
        products: [K, K] float64, inner products of the groups' summed gradients.
        counts: samples in all groups of a branch; one with none has no mean gradient, and NaN for a norm.
        names: of the branches to compare. With two of them the pair's names are left out of the keys.
    """
    means = {
        branch: [float(group.branch == branch) / counts[branch] if counts[branch] else math.nan for group in groups]
        for branch in names
    }
    norms = {branch: math.sqrt(_product(mean, products, mean)) for branch, mean in means.items()}
    values: dict[str, float] = {}
    for one, other in itertools.combinations(names, 2):
        pair = "" if len(names) == 2 else f"_{names[one]}_{names[other]}"
        dot = _product(means[one], products, means[other], signed=True)
        values[f"branch_dot_product{pair}"] = dot
        values[f"branch_cosine{pair}"] = _ratio(dot, norms[one] * norms[other])
    return values | {f"{names[branch]}_grad_norm": norm for branch, norm in norms.items()}


def _product(left: Sequence[float], products: Tensor, right: Sequence[float], *, signed: bool = False) -> float:
    """left^T products right; of a vector with itself, rounding may not make it negative."""
    value = float(torch.tensor(left, dtype=torch.float64) @ products @ torch.tensor(right, dtype=torch.float64))
    return value if signed or math.isnan(value) else max(value, 0.0)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0.0 else math.nan
