"""Measures of how far the gradients of samples agree.

    Coh(A) = || sum_{i in A} g_i || / sum_{i in A} || g_i ||        1: all in one direction; 0: they cancel
    GCG    = (Coh(selected) - Coh(full)) / Coh(full) * 100 %        gradient coherence gain
    dot    = < mean_general g, mean_domain g >,  cosine = dot / (norms' product)    counteraction: negative

The functions take norms and inner products instead of gradients: with the samples divided into groups, the squared norm
of a sum over groups is a sum over the matrix of inner products of the groups' summed gradients. 0 / 0 is NaN, because
gradients that are zero have no direction.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Group of samples of one branch whose gradients are summed.

    Attributes:
        branch: The branch, by its index in the table of branches.
        selected: Whether the method selected these samples.
        probe: Whether the samples come from outside the batch, for a branch that the batch does not serve.
    """

    branch: int
    selected: bool = True
    probe: bool = False


def evenly_spaced(count: int, total: int) -> Tensor:
    """Return ``count`` different numbers from 0 to below ``total``, evenly spaced and ascending: [count] int64."""
    assert 1 <= count <= total, (count, total)
    return torch.arange(count) * total // count


def coherence(squared_norm_of_sum: float, norms: Tensor) -> float:
    """Return Coh of samples with the gradient norms ``norms`` [A] float64; NaN if there are none or all are zero."""
    return _ratio(math.sqrt(squared_norm_of_sum), float(norms.sum()))


def coherence_measures(groups: Sequence[Group], products: Tensor, norms: Tensor, selected: Tensor) -> dict[str, float]:
    """Return the coherence of all samples and of the selected ones, the gain in percent, and mean norms.

    Args:
        groups: K groups of samples.
        products: [K, K] float64, inner products of the groups' summed gradients.
        norms: [M] float64, norms of the samples' gradients.
        selected: [M] bool, the samples that the method selected.
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
    """Return the norm of each branch's mean gradient, and the inner product and cosine of every pair of branches.

    Args:
        groups: K groups of samples.
        products: [K, K] float64, inner products of the groups' summed gradients.
        counts: Number of samples in all groups of a branch. A branch with 0 samples gets the norm NaN.
        names: Names of the branches to compare. If there are two, the keys of the pair do not contain the names.
    """
    means = {
        branch: [float(group.branch == branch) / counts[branch] if counts[branch] else math.nan for group in groups]
        for branch in names
    }
    norms = {branch: math.sqrt(_product(mean, products, mean)) for branch, mean in means.items()}
    values: dict[str, float] = {}
    for one, other in itertools.combinations(names, 2):
        pair = "" if len(names) == 2 else f"_{names[one]}:{names[other]}"
        dot = _product(means[one], products, means[other], signed=True)
        values[f"branch_dot_product{pair}"] = dot
        values[f"branch_cosine{pair}"] = _ratio(dot, norms[one] * norms[other])
    return values | {f"{names[branch]}_grad_norm": norm for branch, norm in norms.items()}


def _product(left: Sequence[float], products: Tensor, right: Sequence[float], *, signed: bool = False) -> float:
    """Return left^T products right; unless ``signed``, a value that rounding made negative becomes 0."""
    value = float(torch.tensor(left, dtype=torch.float64) @ products @ torch.tensor(right, dtype=torch.float64))
    return value if signed or math.isnan(value) else max(value, 0.0)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0.0 else math.nan
