"""``distill_head`` against float64: by the formula with autograd, and by finite differences of the surrogate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels import distill_head, head_gradients, linear_logprob, products
from megatron_camopd.kernels.distill_head import TokenMetrics
from megatron_camopd.objective import camopd_loss
from tests.support.head_problems import (
    BACK_ENDS,
    close,
    exact_leaves,
    leaves,
    on_policy_problem,
    problem,
    reference_logprobs,
    reference_loss,
    use_back_end,
)

NAN, INF = float("nan"), float("inf")
SHAPES = [(1, 3, 2), (7, 13, 5), (37, 129, 33), (64, 1543, 48)]  # N tokens, V columns, H; 1543 is prime, and four tiles
EVERY_SHAPE = [("torch", *shape) for shape in SHAPES] + [("triton", *shape) for shape in SHAPES[:3]]
MODES = [("mask", 0.5, 5.0), ("clip", 0.5, 2.0), ("none", 0.5, 5.0)]
both_back_ends = pytest.mark.parametrize("back_end", BACK_ENDS)
every_mode = pytest.mark.parametrize("importance", MODES)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # of Triton's interpreter


def check(
    inputs: dict[str, Tensor], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Tensor]:
    """Loss, log-probabilities and both gradients against the reference, in the dtype's own precision; our leaves."""
    ours = leaves(inputs, dtype, device)
    exact = exact_leaves(ours)
    loss, logprob = distill_head(**ours, **options)
    (loss * 3.0).backward()
    expected, expected_logprob = reference_loss(exact, {k: v for k, v in options.items() if k != "chunk_tokens"})
    (expected * 3.0).backward()
    assert loss.dtype == logprob.dtype == torch.float32 and loss.dim() == 0 and not logprob.requires_grad
    close(logprob, expected_logprob, 2e-6)
    # The terms of the loss may cancel; their sizes bound the rounding.
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    # 16 bits round the logits' gradient on matrix units, the gradient as it waits, and that times the upstream 3.
    relative = 1e-5 if dtype == torch.float32 else 1e-2
    for name in ("hidden", "weight"):
        gradient = ours[name].grad
        assert gradient is not None and gradient.dtype == dtype
        close(gradient, exact[name].grad, relative)
    return ours


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("back_end", "tokens", "vocab", "width"), EVERY_SHAPE)
def test_shapes(
    back_end: str, tokens: int, vocab: int, width: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = use_back_end(back_end, monkeypatch)
    check(problem(tokens, vocab, width), device, temperature=temperature, chunk_tokens=6)


@both_back_ends
@every_mode
@pytest.mark.parametrize("floor", [None, -0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(
    back_end: str,
    importance: tuple[str, float, float],
    floor: float | None,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = use_back_end(back_end, monkeypatch)
    token_weights = (torch.arange(37) % 3 * 0.5).to(device) if weighted else None
    inputs = on_policy_problem(37, 24, 8, seed=2)
    check(inputs, device, importance=importance, advantage_floor=floor, token_weights=token_weights)


@both_back_ends
def test_phantom_columns(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(11, 32, 6)
    inputs["weight"][21:] = 1e4
    inputs["targets"] %= 21
    ours = check(inputs, device, valid_vocab_size=21, temperature=0.7)
    assert ours["weight"].grad is not None and ours["weight"].grad[21:].eq(0.0).all()


@both_back_ends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peaked_rows(back_end: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = on_policy_problem(20, 521, 32, peak=10.0, seed=5)
    assert (inputs["hidden"] @ inputs["weight"].t()).abs().max() > 35.0
    check(inputs, device, dtype, importance=("none", 0.5, 5.0), chunk_tokens=12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_blocks_of_the_weight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 16-bit weight that is widened ten rows at a time, the last block short."""
    monkeypatch.setattr(products, "WIDENED_BLOCK_BYTES", 4 * 64 * 10)
    check(problem(48, 257, 64, peak=4.0), dtype=dtype, importance=("clip", 0.5, 5.0), chunk_tokens=20)


@both_back_ends
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_hidden_and_weight_of_different_dtypes(
    back_end: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = use_back_end(back_end, monkeypatch)
    ours = leaves(problem(9, 24, 6), torch.float32, device)
    ours["hidden"] = ours["hidden"].detach().to(hidden_dtype).requires_grad_()
    ours["weight"] = ours["weight"].detach().to(weight_dtype).requires_grad_()
    exact = exact_leaves(ours)
    distill_head(**ours)[0].backward()
    reference_loss(exact, {})[0].backward()
    close(ours["hidden"].grad, exact["hidden"].grad, 1e-2)
    close(ours["weight"].grad, exact["weight"].grad, 1e-2)


@both_back_ends
@every_mode
@pytest.mark.parametrize("floor", [None, -0.5])
def test_gradients_are_differences_of_the_surrogate(
    back_end: str, importance: tuple[str, float, float], floor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """- sum c v w A logprob(hidden, weight) in float64, A and w as returned at the base point and held there."""
    device = use_back_end(back_end, monkeypatch)
    inputs, step = on_policy_problem(7, 11, 3), 1e-5
    token_weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.5, 1.0])
    ours = leaves(inputs, torch.float32, device)
    options: dict[str, Any] = {"importance": importance, "advantage_floor": floor, "temperature": 0.7}
    loss, _, metrics = distill_head(**ours, token_weights=token_weights.to(device), token_metrics=True, **options)
    loss.backward()
    frozen = (inputs["coefficients"] * token_weights).double()
    frozen = frozen * metrics.importance.cpu().double() * metrics.gap.cpu().double()

    def surrogate(hidden: Tensor, weight: Tensor) -> float:
        return -(frozen * reference_logprobs(hidden, weight, inputs["targets"], 0.7)[0]).sum().item()

    point = {name: inputs[name].double() for name in ("hidden", "weight")}
    assert abs(surrogate(**point) - loss.item()) < 1e-5
    for name, base in point.items():
        slopes = torch.zeros_like(base)
        for place in range(base.numel()):
            ends = []
            for sign in (1.0, -1.0):
                other = base.clone()
                other.view(-1)[place] += sign * step
                ends.append(surrogate(**(point | {name: other})))
            slopes.view(-1)[place] = (ends[0] - ends[1]) / (2.0 * step)
        assert slopes.abs().max() > 1e-3
        close(ours[name].grad, slopes, 1e-5)


@both_back_ends
@every_mode
def test_token_metrics(back_end: str, importance: tuple[str, float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = on_policy_problem(14, 29, 4)
    ours = {name: value.to(device) for name, value in inputs.items()}
    options: dict[str, Any] = {"importance": importance, "advantage_floor": -0.5, "temperature": 0.7, "chunk_tokens": 5}
    loss, logprob, metrics = distill_head(**ours, token_metrics=True, **options)
    plain_loss, plain_logprob = distill_head(**ours, **options)
    assert torch.equal(loss, plain_loss) and torch.equal(logprob, plain_logprob)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    expected, entropy = reference_logprobs(exact["hidden"], exact["weight"], exact["targets"], 0.7)
    gap = (exact["teacher_logprobs"] - expected).clamp(min=-0.5)
    ratio = (expected - exact["rollout_logprobs"]).exp()
    mode, low, high = importance
    kept = (ratio >= low) & (ratio <= high)
    weight = {"mask": ratio * kept, "clip": ratio.clamp(max=high), "none": torch.ones_like(ratio)}[mode]
    feedback = exact["coefficients"] * weight * gap
    for actual, value in zip(metrics, TokenMetrics(entropy, gap, weight, feedback, -feedback * expected), strict=True):
        assert actual.dtype == torch.float32 and not actual.requires_grad
        close(actual, value, 1e-5)
    torch.testing.assert_close(metrics.loss.sum(), loss)


# ----------------------------------------------------------------------------------------- the weight's gradient ahead


@both_back_ends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_weight_gradient_is_added_ahead(
    back_end: str, dtype: torch.dtype, as_tensor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onto what the buffer holds, times the gradient that the loss will receive; the rest as through autograd."""
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(21, 37, 8, peak=3.0)
    inputs["weight"][31:] = 1e4  # phantom
    inputs["targets"] %= 31
    scale, held = 2.5, torch.randn(37, 8, generator=torch.Generator().manual_seed(9)).to(device)
    options: dict[str, Any] = {"valid_vocab_size": 31, "chunk_tokens": 8, "importance": ("clip", 0.5, 2.0)}
    ours, exact, buffer = leaves(inputs, dtype, device), exact_leaves(leaves(inputs, dtype)), held.clone()
    loss_gradient = torch.tensor(scale, device=device) if as_tensor else scale
    loss, _ = distill_head(**ours, **options, weight_gradient=buffer, loss_gradient=loss_gradient)
    after_forward = buffer.clone()
    (loss * scale).backward()
    assert torch.equal(buffer, after_forward) and ours["weight"].grad is None

    (reference_loss(exact, options)[0] * scale).backward()
    relative = 1e-5 if dtype == torch.float32 else 1e-2
    close(buffer - held, exact["weight"].grad, relative)
    close(ours["hidden"].grad, exact["hidden"].grad, relative)
    assert torch.equal(buffer[31:], held[31:])


def test_another_gradient_than_announced_is_an_error() -> None:
    inputs = problem(5, 9, 3)
    loss, _ = distill_head(**leaves(inputs, torch.float32), weight_gradient=torch.zeros(9, 3), loss_gradient=2.0)
    with pytest.raises(RuntimeError, match="another gradient than loss_gradient"):
        (loss * 2.5).backward()
    loss, _ = distill_head(**leaves(inputs, torch.float32), weight_gradient=torch.zeros(9, 3))
    with pytest.raises(RuntimeError, match="another gradient than loss_gradient"):
        (loss * NAN).backward()


def test_weight_gradient_without_grad_mode_stays_as_it_is() -> None:
    inputs, buffer = problem(5, 9, 3), torch.ones(9, 3)
    with torch.no_grad():
        loss, _ = distill_head(**leaves(inputs, torch.float32), weight_gradient=buffer, loss_gradient=2.0)
    assert not loss.requires_grad and buffer.eq(1.0).all()
    torch.testing.assert_close(loss, distill_head(**inputs)[0])


# ------------------------------------------------------------------------------------------------- 16-bit matrix units


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_fp16_gradients_do_not_underflow(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use coefficients as of long responses, 1 / (|S| L) and below; the loss scale comes only after them."""
    device = use_back_end("triton", monkeypatch)
    inputs = problem(32, 257, 64, peak=4.0)
    inputs["coefficients"] *= size
    ours = leaves(inputs, torch.float16, device)
    exact = exact_leaves(ours)
    loss_scale = 1024.0 / size
    (distill_head(**ours, chunk_tokens=20)[0] * loss_scale).backward()
    (reference_loss(exact, {})[0] * loss_scale).backward()
    for name in ("hidden", "weight"):
        close(ours[name].grad, exact[name].grad, 2.0**-10)


# ------------------------------------------------------------------------------------------- what calls have in common


def test_it_is_the_fused_camopd_loss() -> None:
    """The kernel's flat tokens with coefficients r / (|S| L) against the [N, R] reference of the objective."""
    lengths, selected, scale = torch.tensor([4, 1, 3]), torch.tensor([True, False, True]), 2.0
    mask = torch.arange(4)[None, :] < lengths[:, None]
    inputs = problem(12, 20, 6, seed=6)
    coefficients = (selected * scale / (2 * lengths))[:, None] * mask
    ours = leaves(inputs | {"coefficients": coefficients.flatten()}, torch.float32)
    loss, _ = distill_head(**ours)
    loss.backward()

    other = leaves(inputs, torch.float32)
    logprob, _ = linear_logprob(other["hidden"], other["weight"], other["targets"])
    student, teacher, rollout = (x.view(3, 4) for x in (logprob, other["teacher_logprobs"], other["rollout_logprobs"]))
    expected = camopd_loss(student, teacher, rollout, mask, selected, scale)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    close(ours["hidden"].grad, other["hidden"].grad, 1e-6)
    close(ours["weight"].grad, other["weight"].grad, 1e-6)


def test_gradients_are_made_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(head_gradients, name)

        def call(*args: Tensor) -> Any:
            calls.append(name)
            return original(*args)

        return call

    for name in ("hidden_gradient_into", "add_weight_gradient"):
        monkeypatch.setattr(head_gradients, name, counted(name))
    inputs = problem(5, 9, 3)
    expected = distill_head(**inputs)[0]
    with torch.no_grad():
        loss, _ = distill_head(**leaves(inputs, torch.float32))
    assert calls == [] and not loss.requires_grad and torch.equal(loss, expected)
    distill_head(**(inputs | {"weight": inputs["weight"].clone().requires_grad_()}))[0].backward()
    assert calls == ["add_weight_gradient"]
    hidden = inputs["hidden"].clone().requires_grad_()
    loss = distill_head(**(inputs | {"hidden": hidden}))[0]
    assert calls == ["add_weight_gradient", "hidden_gradient_into"]
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * first)


@both_back_ends
def test_chunks_change_nothing_and_runs_repeat_bitwise(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(26, 40, 12, seed=8)
    results = []
    for chunk in (None, None, 1, 7, 26, 1000):
        ours = leaves(inputs, torch.float32, device)
        loss, logprob = distill_head(**ours, chunk_tokens=chunk)
        loss.backward()
        gradients = [ours[name].grad for name in ("hidden", "weight")]
        results.append([value.detach().cpu() for value in (loss, logprob, *gradients) if value is not None])
    assert len(results[0]) == 4 and all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for other in results[2:]:
        for actual, expected in zip(other, results[0], strict=True):
            close(actual, expected, 1e-6)
