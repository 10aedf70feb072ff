"""The objective against its formulas, computed here in plain Python floats, and the edge cases they leave open."""

import math

import pytest
import torch
from torch import Tensor

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective import (
    camopd_loss,
    gap_scores,
    importance_weights,
    log_prob_gap,
    mean_coefficients,
    sample_coefficients,
    select_by_gap_mass,
)
from megatron_camopd.schedule import Branch

LENGTHS = [5, 1, 3, 0, 7, 2]


def random_batch(seed: int, lengths: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [N, R] float64 of student, teacher, rollout, and the mask; the engine is off enough to mask."""
    lengths = LENGTHS if lengths is None else lengths
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    student = -3.0 * torch.rand(shape, generator=generator, dtype=torch.float64)
    teacher = -3.0 * torch.rand(shape, generator=generator, dtype=torch.float64)
    rollout = student + torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher, rollout, torch.arange(shape[1])[None, :] < torch.tensor(lengths)[:, None]


def weight_by_formula(student: float, rollout: float, mode: str, low: float, high: float) -> float:
    ratio = math.exp(student - rollout)
    return {"mask": ratio if low <= ratio <= high else 0.0, "clip": min(ratio, high), "none": 1.0}[mode]


def loss_by_formula(
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    selected: list[bool],
    scale: float,
    importance: tuple[str, float, float],
) -> tuple[float, list[list[float]]]:
    """Eq. 7 term by term: the loss, and its gradient in the student's log-probabilities."""
    student, teacher, rollout, mask = (tensor.tolist() for tensor in batch)
    loss, gradient = 0.0, [[0.0] * len(row) for row in student]
    for i in range(len(student)):
        if not selected[i]:
            continue
        length = max(sum(mask[i]), 1)
        for t in range(len(student[i])):
            if mask[i][t]:
                weight = weight_by_formula(student[i][t], rollout[i][t], *importance)
                feedback = weight * scale * (teacher[i][t] - student[i][t]) / (length * sum(selected))
                loss -= feedback * student[i][t]
                gradient[i][t] = -feedback
    return loss, gradient


# ---------------------------------------------------------------------------------------------------------------- gap


def test_gap_is_teacher_minus_student_without_graph() -> None:
    student = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    teacher = torch.tensor([[-0.5, -4.0]], requires_grad=True)
    gap = log_prob_gap(teacher, student)
    assert gap.tolist() == [[0.5, -2.0]] and not gap.requires_grad
    with pytest.raises(ValueError, match="differ"):
        log_prob_gap(torch.zeros(2, 3), torch.zeros(1, 3))


# ------------------------------------------------------------------------------------------------------------- scores


def test_scores_by_hand() -> None:
    gap = torch.tensor([[0.5, -1.5, 9.0], [-2.0, -1.0, -3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    general, domain = gap_scores(gap, mask, Branch.GENERAL), gap_scores(gap, mask, Branch.DOMAIN)
    assert general.dtype == domain.dtype == torch.float64
    assert general.tolist() == [1.0, 2.0, 4.0]
    assert domain.tolist() == [0.25, 0.0, 4.0]  # L counts the tokens with a negative gap too


@pytest.mark.parametrize("branch", list(Branch))
def test_scores_by_formula(branch: Branch) -> None:
    student, teacher, _, mask = random_batch(1)
    gap = log_prob_gap(teacher, student)
    expected = []
    for row, length in zip(gap.tolist(), LENGTHS, strict=True):
        terms = [abs(value) if branch is Branch.GENERAL else max(value, 0.0) for value in row[:length]]
        expected.append(sum(terms) / max(length, 1))
    torch.testing.assert_close(gap_scores(gap, mask, branch), torch.tensor(expected, dtype=torch.float64))


def test_scores_never_read_padding_and_sum_in_float64() -> None:
    gap = torch.tensor([[1.0, float("nan"), float("inf")], [float("nan")] * 3])
    mask = torch.tensor([[True, False, False], [False, False, False]])
    assert gap_scores(gap, mask, Branch.GENERAL).tolist() == [1.0, 0.0]
    tiny = torch.full((1, 4097), 2.0**-25)
    tiny[0, 0] = 1.0  # in float32, 1 + 2^-25 is 1
    assert gap_scores(tiny, torch.ones(1, 4097), Branch.DOMAIN).item() == (1.0 + 4096 * 2.0**-25) / 4097


def test_scores_need_a_branch_and_one_shape() -> None:
    with pytest.raises(ValueError, match="branch is 'general'"):
        gap_scores(torch.zeros(1, 1), torch.ones(1, 1), "general")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ"):
        gap_scores(torch.zeros(2, 3), torch.ones(2), Branch.GENERAL)


# ---------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("scores", "target", "expected"),
    [
        ([1.0, 4.0, 2.0, 3.0], 0.8, [False, True, True, True]),  # 4 + 3 = 7 < 8 <= 9
        ([1.0, 4.0, 2.0, 3.0], 0.7, [False, True, False, True]),  # 7 of 10: reached exactly
        ([1.0, 4.0, 2.0, 3.0], 0.4, [False, True, False, False]),
        ([1.0, 4.0, 2.0, 3.0], 1e-9, [False, True, False, False]),  # never fewer than one
        ([1.0, 4.0, 0.0, 3.0], 1.0, [True, True, False, True]),  # a zero adds nothing
        ([1.0, 1e-30, 0.0], 1.0, [True, True, False]),  # too small for the rounded sum, positive all the same
        ([2.0, 2.0, 2.0, 2.0], 0.5, [True, True, False, False]),  # ties: by index
        ([1.0, 2.0, 2.0, 2.0], 0.5, [False, True, True, False]),
        ([0.0, 0.0, 0.0], 0.8, [True, True, True]),
        ([0.0, 0.0], 1.0, [True, True]),
        ([0.0, 0.0, 5e-324], 0.4, [False, False, True]),  # 0.4 of the smallest number rounds to 0
        ([7.0], 0.8, [True]),
        ([], 0.8, []),
    ],
)
def test_selection_by_hand(scores: list[float], target: float, expected: list[bool]) -> None:
    mask = select_by_gap_mass(torch.tensor(scores, dtype=torch.float64), target)
    assert mask.dtype == torch.bool and mask.tolist() == expected


@pytest.mark.parametrize("target", [0.3, 0.6, 0.8, 0.95, 1.0])
def test_selection_is_the_smallest_covering_prefix(target: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for size in (1, 2, 17, 512):
        # Few distinct values, so that ties are many.
        scores = torch.randint(0, 9, (size,), generator=generator).double() * 0.37 + 0.1
        order = sorted(range(size), key=lambda i: (-scores[i].item(), i))
        total = 0.0
        for i in order:
            total += scores[i].item()
        mass, chosen = 0.0, set()
        for i in order:
            chosen.add(i)
            mass += scores[i].item()
            if mass >= target * total:
                break
        assert set(select_by_gap_mass(scores, target).nonzero().flatten().tolist()) == chosen


def test_selection_compares_in_float64() -> None:
    scores = torch.ones(5, dtype=torch.float32)
    scores[4] = 1e-8  # lost in a float32 sum; then 4 of 4 would reach any target
    assert select_by_gap_mass(scores, 0.9999999999).tolist() == [True] * 5


@pytest.mark.parametrize("target", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_impossible_mass_is_refused(target: float) -> None:
    with pytest.raises(ConfigurationError, match=r"--general-mass-target.* \(0, 1\]"):
        select_by_gap_mass(torch.ones(3), target)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9])
def test_impossible_scores_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="sample 1"):
        select_by_gap_mass(torch.tensor([1.0, bad, 2.0]), 0.8)
    with pytest.raises(ValueError, match="one score a sample"):
        select_by_gap_mass(torch.ones(2, 2), 0.8)


# ------------------------------------------------------------------------------------------------- importance weights


@pytest.mark.parametrize("mode", ["mask", "clip", "none"])
def test_importance_by_formula(mode: str) -> None:
    student, _, rollout, _ = random_batch(2)
    weights = importance_weights(student.requires_grad_(), rollout, mode, 0.5, 2.0)
    expected = [
        [weight_by_formula(s, m, mode, 0.5, 2.0) for s, m in zip(row_s, row_m, strict=True)]
        for row_s, row_m in zip(student.tolist(), rollout.tolist(), strict=True)
    ]
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    if mode == "mask":
        assert 0 < int((weights == 0.0).sum()) < weights.numel()


def test_importance_limits_are_inside_and_extremes_stay_finite() -> None:
    zero = torch.zeros(1)
    assert importance_weights(zero, zero, "mask", 1.0, 1.0).item() == 1.0
    far = torch.tensor([-1000.0])
    assert importance_weights(zero, far, "mask", 0.5, 5.0).item() == 0.0
    assert importance_weights(zero, far, "clip", 0.5, 5.0).item() == 5.0
    assert importance_weights(far, zero, "clip", 0.5, 5.0).item() == 0.0  # the lower limit belongs to mask alone
    assert importance_weights(torch.tensor([float("nan")]), zero).isnan().all()


@pytest.mark.parametrize(
    ("mode", "low", "high", "flag"),
    [
        ("trim", 0.5, 5.0, "--importance-correction is 'trim'"),
        ("mask", 6.0, 5.0, "--importance-low is 6.0"),
        ("mask", -0.5, 5.0, "--importance-low is -0.5"),
        ("mask", float("nan"), 5.0, "--importance-low is nan"),
        ("clip", 0.5, 0.0, "--importance-high is 0.0"),
        ("clip", 0.5, float("nan"), "--importance-high is nan"),
    ],
)
def test_impossible_importance_is_refused(mode: str, low: float, high: float, flag: str) -> None:
    with pytest.raises(ConfigurationError, match=flag):
        importance_weights(torch.zeros(1), torch.zeros(1), mode, low, high)


# ------------------------------------------------------------------------------------------------------- coefficients


def test_coefficients_by_hand() -> None:
    selected = torch.tensor([True, False, True, True])
    coefficients = sample_coefficients(torch.tensor([3.0, 0.1, 2.0, 1.0]), selected, torch.tensor([4, 2, 1, 0]), 2.0)
    assert coefficients.dtype == torch.float32
    torch.testing.assert_close(coefficients, torch.tensor([2 / 12, 0.0, 2 / 3, 2 / 3]))  # a length of 0 counts as 1
    torch.testing.assert_close(
        mean_coefficients(torch.tensor([4, 1, 0, 2])), torch.tensor([1 / 16, 1 / 4, 1 / 4, 1 / 8])
    )


def test_all_scores_zero_keeps_every_sample_with_coefficient_zero() -> None:
    scores = gap_scores(-torch.ones(3, 2), torch.ones(3, 2), Branch.DOMAIN)  # gaps below 0 only: nothing to preserve
    selected = select_by_gap_mass(scores, 0.8)
    assert selected.tolist() == [True] * 3
    assert sample_coefficients(scores, selected, torch.tensor([2, 2, 2]), 1.0).tolist() == [0.0] * 3


def test_no_samples_and_none_selected_give_no_nan() -> None:
    none = torch.zeros(2, dtype=torch.bool)
    assert sample_coefficients(torch.ones(2), none, torch.tensor([1, 1]), 2.0).tolist() == [0.0, 0.0]
    assert sample_coefficients(torch.ones(0), none[:0], torch.ones(0, dtype=torch.int64), 2.0).tolist() == []
    assert mean_coefficients(torch.ones(0, dtype=torch.int64)).tolist() == []


# --------------------------------------------------------------------------------------------------------------- loss


def test_loss_by_hand() -> None:
    """Two samples of lengths 2 and 1, both selected, r = 2, engine equal to the student (w = 1).

    Sample 0: A = (0.5, -1), A log pi = (-0.5, 2): mean 0.75. Sample 1: A = 1, log pi = -3: -3.
    Loss = -(1 / 2) * 2 * (0.75 - 3) = 2.25; gradient of token (0, 0) = -(1 / 2) * (1 / 2) * 2 * 0.5 = -0.25.
    """
    student = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.5, -3.0], [-2.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    loss = camopd_loss(student, teacher, student.detach(), mask, torch.tensor([True, True]), 2.0)
    loss.backward()
    assert loss.item() == 2.25 and loss.dim() == 0
    assert student.grad is not None and student.grad.tolist() == [[-0.25, 0.5], [-1.0, 0.0]]


@pytest.mark.parametrize("importance", [("mask", 0.5, 5.0), ("mask", 0.2, 1.5), ("clip", 0.5, 2.0), ("none", 0.5, 5.0)])
@pytest.mark.parametrize("chosen", [[0, 2, 4], [3], [0, 1, 2, 3, 4, 5]])
def test_loss_and_gradient_by_formula(importance: tuple[str, float, float], chosen: list[int]) -> None:
    batch = random_batch(4)
    selected = [row in chosen for row in range(len(LENGTHS))]
    expected, gradient = loss_by_formula(batch, selected, 2.0, importance)
    student, teacher, rollout, mask = batch
    student.requires_grad_()
    loss = camopd_loss(student, teacher, rollout, mask, torch.tensor(selected), 2.0, importance=importance)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(student.grad, torch.tensor(gradient, dtype=torch.float64))


def test_sample_coefficients_are_the_weights_of_the_loss() -> None:
    student, teacher, rollout, mask = random_batch(5)
    gap = log_prob_gap(teacher, student)
    scores = gap_scores(gap, mask, Branch.GENERAL)
    selected = select_by_gap_mass(scores, 0.8)
    assert 0 < int(selected.sum()) < len(LENGTHS)
    coefficients = sample_coefficients(scores, selected, torch.tensor(LENGTHS), 2.0).double()
    terms = coefficients[:, None] * importance_weights(student, rollout) * gap * student
    loss = camopd_loss(student, teacher, rollout, mask, selected, 2.0)
    torch.testing.assert_close(loss, -terms[mask].sum(), rtol=1e-6, atol=0.0)


def test_fully_masked_sample_still_counts_as_selected() -> None:
    student, teacher, rollout, mask = random_batch(6, [3, 3])
    both = torch.tensor([True, True])
    alone = camopd_loss(student[:1], teacher[:1], rollout[:1], mask[:1], both[:1], 1.0)
    mask[1] = False
    torch.testing.assert_close(camopd_loss(student, teacher, rollout, mask, both, 1.0), alone / 2)


def test_padding_and_dropped_tokens_leave_no_nan() -> None:
    student, teacher, rollout, mask = random_batch(7)
    selected = torch.tensor([True, False, True, True, False, True])
    clean = camopd_loss(student, teacher, rollout, mask, selected, 2.0)
    unread = ~(mask & selected[:, None])
    dirty = [tensor.masked_fill(unread, float("nan")) for tensor in (student, teacher, rollout)]
    dirty[0].requires_grad_()
    loss = camopd_loss(dirty[0], dirty[1], dirty[2], mask, selected, 2.0)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    assert dirty[0].grad is not None and dirty[0].grad.isfinite().all() and (dirty[0].grad[unread] == 0).all()

    # A token far off-policy is dropped by mask, even where the teacher excludes it.
    one = torch.tensor([[-1.0]], requires_grad=True)
    far, gone = torch.tensor([[-9.0]]), torch.tensor([[-float("inf")]])
    loss = camopd_loss(one, gone, far, torch.ones(1, 1), torch.ones(1), 1.0)
    loss.backward()
    assert loss.item() == 0.0 and one.grad is not None and one.grad.item() == 0.0


def test_equal_teacher_and_empty_selection_give_exact_zero() -> None:
    student, _, rollout, mask = random_batch(8)
    student.requires_grad_()
    everything, nothing = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    for teacher, selected in ((student.detach(), everything), (student.detach() - 1.0, nothing)):
        student.grad = None
        loss = camopd_loss(student, teacher, rollout, mask, selected, 1.0)
        loss.backward()
        assert loss.item() == 0.0 and student.grad is not None and student.grad.eq(0.0).all()


def test_broken_student_shows_in_the_loss() -> None:
    student, teacher, rollout, mask = random_batch(9)
    student[0, 0] = float("nan")
    assert camopd_loss(student, teacher, rollout, mask, torch.ones(6), 1.0).isnan()
