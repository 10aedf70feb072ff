"""Every method's coefficients against loops in float64 that spell out the formulas of the papers, token by token.

That the training pass then uses these coefficients rightly, on every layout, is ``distributed/test_methods.py``.
"""

import dataclasses
import math
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest, TokenScores
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective import registry
from megatron_camopd.objective.method import Method, TrainingWeights, compute_weights
from megatron_camopd.objective.relaxed_opd import reward_floor, top_entropy_tokens
from megatron_camopd.objective.selectkd import greedy_acceptance, speculative_acceptance
from megatron_camopd.schedule import Branch, BranchSpec

LENGTHS = [4, 1, 7, 3, 6, 2, 5, 7]
SETTINGS: dict[str, Any] = {
    "distill_method": "camopd", "general_mass_target": 0.8, "domain_mass_target": 0.6, "general_feedback_scale": 2.0,
    "domain_feedback_scale": 1.5, "unselected_samples": "drop", "relaxed_opd_floor": "scaled-log",
    "relaxed_opd_lambda": 0.1, "relaxed_opd_entropy_fraction": 0.2, "relaxed_opd_switch_step": 5,
    "selectkd_verification": "greedy", "selectkd_candidates": 3, "selectkd_rejected_weight": 0.01, "seed": 7,
    "recovery_steps": 3, "preservation_steps": 1,
}  # fmt: skip
GENERAL, DOMAIN, MIXED = [0] * 8, [1] * 8, [0] * 6 + [1] * 2  # branch of each sample


def method(**changes: Any) -> Method:
    args = Namespace(**(SETTINGS | changes))
    branches = [
        BranchSpec(
            name=branch.value,
            score=branch.score,
            mass_target=getattr(args, f"{branch.value}_mass_target"),
            feedback_scale=getattr(args, f"{branch.value}_feedback_scale"),
        )
        for branch in Branch
    ]
    return registry.METHODS[args.distill_method].build(args, branches)


def random_batch(branches: list[int] = MIXED, seed: int = 0, **values: Tensor) -> ScoredBatch:
    """Eight samples; gaps of -6 to 6 nats; what lies beyond a response is NaN or nonsense and must not be read."""
    generator = torch.Generator().manual_seed(seed)
    shape, lengths = (8, max(LENGTHS)), torch.tensor(LENGTHS)
    mask = torch.arange(shape[1]) < lengths[:, None]
    student, gap, entropy, mu = (torch.rand(shape, generator=generator) for _ in range(4))
    student, gap = -4 * student, 12 * gap - 6
    rollout = RolloutBatch(
        indices=torch.arange(8),
        tokens=torch.zeros(8, 9, dtype=torch.int64),
        prompt_lengths=torch.full((8,), 2),
        response_lengths=lengths,
        rollout_logprobs=student + mu,
        truncated=torch.zeros(8, dtype=torch.bool),
    )
    fields = {
        "teacher_logprobs": (student + gap).masked_fill(~mask, torch.nan),
        "student_logprobs": student,
        "student_entropies": (3 * entropy).masked_fill(~mask, 100.0),
    }
    return ScoredBatch(rollout, torch.tensor(branches), **(fields | values))


def gaps(batch: ScoredBatch) -> list[list[float]]:
    """Compute log-probabilities of the response tokens alone, as the formulas say."""
    teacher, student = batch.teacher_logprobs.double().tolist(), batch.student_logprobs.double().tolist()
    return [[teacher[i][t] - student[i][t] for t in range(length)] for i, length in enumerate(LENGTHS)]


def same(found: TrainingWeights, expected: list[list[float]]) -> None:
    """Coefficients [N][L_i] of response tokens; 0 beyond."""
    assert found.coefficients.dtype == torch.float32
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            found.coefficients[row, :length].double(), torch.tensor(expected[row]).double(), rtol=1e-6, atol=0.0
        )
        assert not found.coefficients[row, length:].any()


def selection(batch: ScoredBatch, branch: Branch, mass: float) -> list[bool]:
    """Eq. 4-6."""
    scores = [
        sum(abs(gap) if branch is Branch.GENERAL else max(gap, 0.0) for gap in row) / len(row) for row in gaps(batch)
    ]
    chosen, covered = [False] * 8, 0.0
    for row in sorted(range(8), key=lambda i: -scores[i]):
        chosen[row], covered = True, covered + scores[row]
        if covered >= mass * sum(scores):
            break
    assert 1 < sum(chosen) < 8
    return chosen


@pytest.mark.parametrize(("branch", "mass", "scale"), [(Branch.GENERAL, 0.8, 2.0), (Branch.DOMAIN, 0.6, 1.5)])
def test_camopd_and_without_selection(branch: Branch, mass: float, scale: float) -> None:
    batch = random_batch(GENERAL if branch is Branch.GENERAL else DOMAIN)
    chosen = selection(batch, branch, mass)
    found = method().weigh(batch, 0)
    same(found, [[scale / (sum(chosen) * n) if keep else 0.0] * n for keep, n in zip(chosen, LENGTHS, strict=True)])
    assert found.selected.tolist() == chosen and found.advantage_floor is None
    kept = method(unselected_samples="keep").weigh(batch, 0)
    same(kept, [[(scale if keep else 1.0) / (8 * n)] * n for keep, n in zip(chosen, LENGTHS, strict=True)])
    assert kept.selected.tolist() == chosen
    plain = method(unselected_samples="keep", general_feedback_scale=1.0, domain_feedback_scale=1.0)
    same(plain.weigh(batch, 0), [[1 / (8 * n)] * n for n in LENGTHS])


@pytest.mark.parametrize("unselected", ["drop", "keep"])
def test_a_student_that_is_its_teacher_gets_no_gradient(unselected: str) -> None:
    batch = random_batch(DOMAIN)
    batch = dataclasses.replace(batch, teacher_logprobs=batch.student_logprobs)
    found = method(unselected_samples=unselected).weigh(batch, 0)
    assert not found.coefficients.any() and found.selected.all()


def test_vanilla_mopd_is_the_mean_over_the_pooled_batch() -> None:
    found = method(distill_method="mopd").weigh(random_batch(), 0)
    same(found, [[1 / (8 * n)] * n for n in LENGTHS])
    assert found.selected.all() and found.advantage_floor is None


@pytest.mark.parametrize(
    ("form", "strength", "floor"),
    [
        ("scaled-log", 0.1, -2.558427881104495),  # ln 0.1 / 0.9
        ("scaled-log", 0.9, -1.0536051565782628),  # ln 0.9 / 0.1: negative for every lambda
        ("logit", 0.1, -2.197224577336219),  # ln (1/9)
        ("logit", 0.3, -0.8472978603872036),  # ln (3/7)
    ],
)
def test_reward_floors(form: str, strength: float, floor: float) -> None:
    assert reward_floor(form, strength) == pytest.approx(floor, rel=1e-12)


@pytest.mark.parametrize(("form", "strength"), [("scaled-log", 0.0), ("scaled-log", 1.0), ("logit", 0.5)])
def test_lambdas_without_a_floor_are_refused(form: str, strength: float) -> None:
    with pytest.raises(ConfigurationError, match="--relaxed-opd-lambda"):
        reward_floor(form, strength)


@pytest.mark.parametrize("form", ["scaled-log", "logit"])
@pytest.mark.parametrize("step", [0, 4, 5, 9])
def test_relaxed_opd(form: str, step: int) -> None:
    """Phase 1 keeps tokens by reward, phase 2 (from step 5 on) a fifth of the 35 by entropy: 7."""
    batch = random_batch()
    floor = math.log(0.1) / 0.9 if form == "scaled-log" else math.log(0.1 / 0.9)
    assert batch.student_entropies is not None
    tokens = [(float(batch.student_entropies[i, t]), i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
    if step < 5:
        kept = {(i, t) for i, row in enumerate(gaps(batch)) for t, gap in enumerate(row) if gap >= floor}
        assert 5 < len(kept) < 30
    else:
        kept = {(i, t) for _, i, t in sorted(tokens, key=lambda token: -token[0])[:7]}
    found = method(distill_method="relaxed-opd", relaxed_opd_floor=form).weigh(batch, step)
    same(found, [[((i, t) in kept) / len(kept) for t in range(n)] for i, n in enumerate(LENGTHS)])
    assert found.advantage_floor == pytest.approx(floor)
    assert found.metrics["kept_token_fraction"] == pytest.approx(len(kept) / len(tokens))
    assert found.selected.tolist() == [any((i, t) in kept for t in range(n)) for i, n in enumerate(LENGTHS)]


def test_entropy_ties_and_fractions() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    entropies = torch.tensor([[1.0, 2.0, 9.0], [2.0, 2.0, 0.0]])
    assert top_entropy_tokens(entropies, mask, 0.4).tolist() == [[False, True, False], [True, False, False]]
    assert int(top_entropy_tokens(entropies, mask, 1e-6).sum()) == 1  # never none
    assert torch.equal(top_entropy_tokens(entropies, mask, 1.0), mask)
    row = torch.rand(1, 15)  # 0.2 x 15 is a little more than 3 in binary
    assert int(top_entropy_tokens(row, torch.ones(1, 15, dtype=torch.bool), 0.2).sum()) == 3


def test_no_token_reaches_the_floor() -> None:
    batch = random_batch()
    batch = dataclasses.replace(batch, teacher_logprobs=batch.student_logprobs - 50.0)
    found = method(distill_method="relaxed-opd").weigh(batch, 0)
    assert not found.coefficients.any() and found.metrics["kept_token_fraction"] == 0.0


@pytest.mark.parametrize("rejected", [0.01, 0.0, 1.0])
def test_selectkd_weights(rejected: float) -> None:
    accepted = torch.rand(8, max(LENGTHS), generator=torch.Generator().manual_seed(3)) < 0.6
    batch = random_batch(accepted=accepted)
    found = method(distill_method="selectkd", selectkd_rejected_weight=rejected).weigh(batch, 0)
    expected = [[(1.0 if accepted[i, t] else rejected) / (8 * n) for t in range(n)] for i, n in enumerate(LENGTHS)]
    same(found, expected)
    verdicts = [bool(accepted[i, t]) for i, n in enumerate(LENGTHS) for t in range(n)]
    assert found.metrics["acceptance_rate"] == pytest.approx(sum(verdicts) / len(verdicts))


def test_greedy_acceptance_by_hand() -> None:
    student = torch.tensor([[[4], [9]]])
    teacher = torch.tensor([[[7, 4, 1], [1, 2, 3]]])
    assert greedy_acceptance(student, teacher).tolist() == [[True, False]]


def test_speculative_acceptance_by_hand() -> None:
    """Ratios 2 (always accepted), 1/2 and 1/4; a token is accepted when any of its draws is."""
    student = torch.log(torch.tensor([[0.2, 0.4, 0.4], [0.4, 0.4, 0.4]]))
    teacher = torch.log(torch.tensor([[0.4, 0.2, 0.1], [0.2, 0.2, 0.1]]))
    uniforms = torch.tensor([[0.999, 0.9, 0.9], [0.6, 0.51, 0.26]]).double()
    assert speculative_acceptance(student, teacher, uniforms).tolist() == [True, False]
    assert speculative_acceptance(student, teacher, uniforms - 0.02).tolist() == [True, True]


def test_speculative_acceptance_has_the_published_rate() -> None:
    """One draw is accepted with probability sum_v min(p_student, p_teacher): draws by the method's own numbers."""
    student, teacher = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    speculative = method(distill_method="selectkd", selectkd_verification="speculative", selectkd_candidates=1)
    rollout = wide_rollout(200, 100)
    request = speculative.student_request(rollout, step=3)
    assert request.uniforms is not None and request.uniforms.shape == (200, 100, 1)
    assert float(request.uniforms.min()) > 0.0 and float(request.uniforms.max()) < 1.0
    drawn = torch.searchsorted(student.cumsum(0), request.uniforms, right=True)
    scores = answer(drawn_ids=drawn, drawn_logprobs=student.log()[drawn].float())
    assert torch.equal(speculative.teacher_request(scores).ids, drawn)  # type: ignore[arg-type]
    verdict = answer(id_logprobs=teacher.log()[drawn].float())
    accepted = speculative.accepted(rollout, 3, scores, verdict)
    assert accepted is not None
    rate = float(accepted.double().mean())
    assert abs(rate - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 20000), rate
    assert not torch.equal(request.uniforms, speculative.student_request(rollout, step=4).uniforms)  # type: ignore[arg-type]


def test_draws_belong_to_the_sample_not_to_its_place() -> None:
    speculative = method(distill_method="selectkd", selectkd_verification="speculative")
    rollout = wide_rollout(6, 5)
    whole = speculative.student_request(rollout, 2).uniforms
    part = speculative.student_request(rollout.take(torch.tensor([4, 1])), 2).uniforms
    assert whole is not None and part is not None
    assert torch.equal(part, whole[[4, 1]])
    assert whole.unique().numel() == whole.numel()


def wide_rollout(samples: int, width: int) -> RolloutBatch:
    return RolloutBatch(
        indices=torch.arange(samples),
        tokens=torch.zeros(samples, width + 1, dtype=torch.int64),
        prompt_lengths=torch.ones(samples, dtype=torch.int64),
        response_lengths=torch.full((samples,), width),
        rollout_logprobs=torch.zeros(samples, width),
        truncated=torch.zeros(samples, dtype=torch.bool),
    )


def answer(**values: Tensor) -> TokenScores:
    empty = {field.name: torch.zeros(0) for field in dataclasses.fields(TokenScores)}
    return TokenScores(**(empty | values))


METHODS = [
    {},
    {"unselected_samples": "keep"},
    {"distill_method": "mopd"},
    {"distill_method": "relaxed-opd"},
    {"distill_method": "selectkd", "selectkd_rejected_weight": 0.0},
]


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_broken_model_spoils_the_loss_whatever_would_be_left_out(settings: dict[str, Any], broken: float) -> None:
    branches = MIXED if "distill_method" in settings else GENERAL
    batch = random_batch(branches, accepted=torch.zeros(8, max(LENGTHS), dtype=torch.bool))
    assert torch.isfinite(compute_weights(method(**settings), batch, 0).coefficients).all()
    for name in ("student_logprobs", "teacher_logprobs"):
        values = getattr(batch, name).clone()
        values[3, 1] = broken
        found = compute_weights(method(**settings), dataclasses.replace(batch, **{name: values}), 0)
        assert found.coefficients[batch.response_mask].isnan().all() and found.selected.all()
        assert not found.coefficients[~batch.response_mask].any()


def test_a_question_and_an_answer_follow_their_rows() -> None:
    request = ScoreRequest(2, ids=torch.arange(6).view(3, 2, 1)).take(torch.tensor([2, 0]))
    assert request.top_k == 2 and request.uniforms is None
    assert request.ids is not None and request.ids.flatten().tolist() == [4, 5, 0, 1]
    parts = [
        (torch.tensor([2, 0]), answer(logprobs=torch.tensor([[3.0, 4.0], [1.0, 0.0]]))),
        (torch.tensor([1]), answer(logprobs=torch.tensor([[2.0]]))),
    ]
    for _, part in parts:  # what was not asked for has no depth
        for name in ("top_ids", "id_logprobs", "drawn_ids", "drawn_logprobs"):
            object.__setattr__(part, name, torch.zeros(*part.logprobs.shape, 0))
        object.__setattr__(part, "entropies", part.logprobs)
    merged = TokenScores.merge(parts)
    assert merged.logprobs.tolist() == [[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]]
    assert merged.top_ids.shape == (3, 2, 0)
