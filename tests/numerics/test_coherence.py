"""Coherence, gain, counteraction and concentration: pure functions, against gradients of known directions."""

import math

import pytest
import torch
from torch import Tensor

from megatron_camopd.diagnostics.coherence import Group, branch_measures, coherence_measures, evenly_spaced
from megatron_camopd.diagnostics.concentration import gini_coefficient, lorenz_curve

GENERAL, DOMAIN = 0, 1
NAMES = {GENERAL: "general", DOMAIN: "domain"}


def measure(
    gradients: Tensor, selected: list[bool], branches: list[int] | None = None, probe: Tensor | None = None
) -> dict[str, float]:
    """All measures of samples with ``gradients`` [M, P], put into the form that the functions take."""
    branches = branches or [GENERAL] * len(gradients)
    groups = [Group(branch, chosen) for branch in dict.fromkeys(branches) for chosen in (True, False)]
    places = [groups.index(Group(branch, chosen)) for branch, chosen in zip(branches, selected, strict=True)]
    sums = torch.zeros(len(groups), gradients.shape[1], dtype=torch.float64).index_add_(
        0, torch.tensor(places), gradients
    )
    counts = {branch: branches.count(branch) for branch in NAMES}
    if probe is not None:
        groups, sums, counts[DOMAIN] = [*groups, Group(DOMAIN, probe=True)], torch.cat([sums, probe[None]]), 1
    products = sums @ sums.T
    return {
        **coherence_measures(groups, products, gradients.norm(dim=1), torch.tensor(selected)),
        **branch_measures(groups, products, counts, NAMES),
    }


def directions(count: int) -> Tensor:
    return torch.eye(count, 12, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_parallel_gradients_have_coherence_one(count: int) -> None:
    lengths = torch.linspace(0.1, 7.0, count, dtype=torch.float64)
    gradients = lengths[:, None] * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = measure(gradients, [True] * count)
    assert found["coherence_full"] == pytest.approx(1.0, rel=1e-12) == found["coherence_selected"]
    assert found["gradient_coherence_gain"] == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_orthogonal_gradients_have_the_inverse_root_of_their_number(count: int) -> None:
    found = measure(3.0 * directions(count), [True] + [False] * (count - 1))
    assert found["coherence_full"] == pytest.approx(count**-0.5, rel=1e-12)
    assert found["coherence_selected"] == pytest.approx(1.0, rel=1e-12)
    assert found["gradient_coherence_gain"] == pytest.approx(100 * (count**0.5 - 1), rel=1e-12, abs=1e-10)


def test_opposite_pairs_cancel() -> None:
    one = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = measure(torch.cat([one, -one]), [True] * 4 + [False] * 4)
    assert found["coherence_full"] == pytest.approx(0.0, abs=1e-7)  # the root of what rounding leaves of a square
    assert found["coherence_selected"] > 0.3


def test_a_gain_by_hand() -> None:
    """(3, 0), (0, 4), (0, -4), selected the first two: full 3 / 11, selected 5 / 7, gain 100 (55 / 21 - 1)."""
    gradients = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -4.0]], dtype=torch.float64)
    found = measure(gradients, [True, True, False])
    assert found["coherence_full"] == pytest.approx(3 / 11, rel=1e-12)
    assert found["coherence_selected"] == pytest.approx(5 / 7, rel=1e-12)
    assert found["gradient_coherence_gain"] == pytest.approx(100 * 34 / 21, rel=1e-12)
    assert found["sample_grad_norm_mean"] == pytest.approx(11 / 3, rel=1e-12)
    assert found["sample_grad_norm_selected_mean"] == pytest.approx(3.5, rel=1e-12)


def test_random_gradients_against_the_vectors_themselves() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    probe = torch.randn(12, dtype=torch.float64, generator=generator)
    selected = [True, False, True, True, False, False, True]
    found = measure(gradients, selected, probe=probe)
    chosen, mean = gradients[torch.tensor(selected)], gradients.mean(dim=0)
    full = float(gradients.sum(dim=0).norm() / gradients.norm(dim=1).sum())
    part = float(chosen.sum(dim=0).norm() / chosen.norm(dim=1).sum())
    assert found["coherence_full"] == pytest.approx(full, rel=1e-12)
    assert found["coherence_selected"] == pytest.approx(part, rel=1e-12)
    assert found["gradient_coherence_gain"] == pytest.approx(100 * (part - full) / full, rel=1e-11)
    assert found["branch_dot_product"] == pytest.approx(float(mean @ probe), rel=1e-11)
    assert found["branch_cosine"] == pytest.approx(float(mean @ probe / mean.norm() / probe.norm()), rel=1e-11)
    assert found["general_grad_norm"] == pytest.approx(float(mean.norm()), rel=1e-12)
    assert found["domain_grad_norm"] == pytest.approx(float(probe.norm()), rel=1e-12)


def test_both_branches_in_one_batch() -> None:
    """Coherence is over all samples, means over each branch's own: (2, 0) and (-1, 1)."""
    gradients = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [-2.0, 3.0]], dtype=torch.float64)
    found = measure(gradients, [True, False, True, False, True], [GENERAL, GENERAL, DOMAIN, DOMAIN, DOMAIN])
    assert found["coherence_full"] == pytest.approx(10**0.5 / (5 + 13**0.5), rel=1e-12)
    assert found["coherence_selected"] == pytest.approx(13**0.5 / (2 + 13**0.5), rel=1e-12)
    assert found["branch_dot_product"] == pytest.approx(-2.0, rel=1e-12)
    assert found["branch_cosine"] == pytest.approx(-(0.5**0.5), rel=1e-12)
    assert found["general_grad_norm"] == pytest.approx(2.0, rel=1e-12)
    assert found["domain_grad_norm"] == pytest.approx(2**0.5, rel=1e-12)


def test_zero_gradients_have_no_direction() -> None:
    found = measure(torch.zeros(3, 12, dtype=torch.float64), [True] * 3, probe=torch.ones(12, dtype=torch.float64))
    assert found["branch_dot_product"] == found["general_grad_norm"] == found["sample_grad_norm_mean"] == 0.0
    for name in ("coherence_full", "coherence_selected", "gradient_coherence_gain", "branch_cosine"):
        assert math.isnan(found[name]), name


def test_nothing_selected_and_a_branch_without_samples_are_not_numbers() -> None:
    found = measure(directions(3), [False] * 3)
    assert found["coherence_full"] == pytest.approx(3**-0.5)
    for name in ("coherence_selected", "gradient_coherence_gain", "sample_grad_norm_selected_mean"):
        assert math.isnan(found[name]), name
    for name in ("branch_dot_product", "branch_cosine", "domain_grad_norm"):
        assert math.isnan(found[name]), name
    assert found["general_grad_norm"] == pytest.approx(3**0.5 / 3)


def test_gradients_that_are_not_finite_give_no_number() -> None:
    gradients = directions(3)
    gradients[1, 1] = math.inf
    found = measure(gradients, [True, False, True])
    assert not math.isfinite(found["coherence_full"]) and not math.isfinite(found["gradient_coherence_gain"])


def test_the_branch_keeps_the_sign_of_the_product() -> None:
    one = directions(2)
    assert measure(one[:1], [True], probe=-one[0])["branch_cosine"] == pytest.approx(-1.0, rel=1e-12)
    assert measure(one[:1], [True], probe=one[1])["branch_dot_product"] == 0.0


@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 8), (3, 8), (4, 8), (8, 8), (100, 512), (511, 512)])
def test_rows_are_different_and_evenly_spaced(count: int, total: int) -> None:
    rows = evenly_spaced(count, total)
    steps = rows.diff()
    assert rows.dtype == torch.int64 and rows[0] == 0 and rows[-1] < total and len(rows) == count
    assert count == 1 or (int(steps.min()) >= 1 and int(steps.max() - steps.min()) <= 1)


# Concentration ----------------------------------------------------------------------------------------------------


def scores(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gini_by_definition(values: Tensor) -> float:
    return float((values[:, None] - values[None, :]).abs().sum() / (2 * len(values) * values.sum()))


def test_a_curve_by_hand() -> None:
    """4, 1, 3, 2 in order of size: 4, 7, 9, 10 tenths after each quarter, straight in between."""
    curve = lorenz_curve(scores(4, 1, 3, 2))
    assert len(curve) == 21
    expected = [0, 0.08, 0.16, 0.24, 0.32, 0.4, 0.46, 0.52, 0.58, 0.64, 0.7, 0.74, 0.78, 0.82, 0.86, 0.9]
    assert curve == pytest.approx([*expected, 0.92, 0.94, 0.96, 0.98, 1.0], rel=1e-12)
    assert gini_coefficient(scores(4, 1, 3, 2)) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("count", [1, 3, 20, 33, 512])
def test_equal_scores_are_spread_evenly(count: int) -> None:
    for value in (0.7, 0.0):  # nobody has more than another, also where there is nothing
        values = torch.full((count,), value)
        assert lorenz_curve(values) == pytest.approx([point / 20 for point in range(21)], rel=1e-12)
        assert gini_coefficient(values) == pytest.approx(0.0, abs=1e-12)


def test_one_sample_with_everything() -> None:
    values = torch.zeros(40)
    values[17] = 3.0
    assert lorenz_curve(values) == [0.0] + [1.0] * 20
    assert gini_coefficient(values) == pytest.approx(1 - 1 / 40, rel=1e-12)


@pytest.mark.parametrize("count", [2, 7, 20, 101])
def test_random_scores_with_ties(count: int) -> None:
    values = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(count)).double()
    curve = lorenz_curve(values)
    assert gini_coefficient(values) == pytest.approx(gini_by_definition(values), rel=1e-12)
    ordered = sorted(values.tolist(), reverse=True)
    for point, share in enumerate(curve):
        whole = math.floor(point * count / 20)
        carried = sum(ordered[:whole]) + (point * count / 20 - whole) * sum(ordered[whole : whole + 1])
        assert share == pytest.approx(carried / sum(ordered), rel=1e-12)
    shuffled = values[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    assert lorenz_curve(shuffled) == curve and gini_coefficient(shuffled) == gini_coefficient(values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_give_no_curve(value: float) -> None:
    assert lorenz_curve(scores(1.0, value)) == [None] * 21
    assert math.isnan(gini_coefficient(scores(1.0, value)))
