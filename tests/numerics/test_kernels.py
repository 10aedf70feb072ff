"""The head operations on one process against a float64 reference: whole logits, and autograd does the rest."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels import distill_head, linear_logprob, vocab_parallel
from megatron_camopd.objective import camopd_loss

SHAPES = [(1, 3, 2), (7, 13, 5), (37, 129, 33), (64, 1000, 48)]  # N tokens, V columns, H


def problem(tokens: int, vocab: int, width: int, *, seed: int = 0, peak: float = 1.0) -> dict[str, Tensor]:
    """Random inputs, fp32; ``peak`` scales the logits: at 20 most rows put all but a little mass on one column."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logprobs = -3.0 * torch.rand(2, tokens, generator=generator)
    return {
        "hidden": normal(tokens, width),
        "weight": normal(vocab, width) * (peak / width**0.5),
        "targets": torch.randint(0, vocab, (tokens,), generator=generator),
        "teacher_logprobs": logprobs[0],
        "rollout_logprobs": logprobs[1] - 1.5,
        "coefficients": torch.rand(tokens, generator=generator) / tokens,
    }


def reference_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, valid: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy in float64, with the whole table of logits."""
    table = torch.log_softmax(hidden @ weight[:valid].t() / temperature, dim=-1)
    return table.gather(1, targets.reshape(len(targets), -1)).view(targets.shape), -(table.exp() * table).sum(dim=-1)


def reference_loss(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """- sum c w v A logprob in float64, from the formula; the weights as if-then on every token."""
    temperature, valid = options.get("temperature", 1.0), options.get("valid_vocab_size")
    logprob, _ = reference_logprobs(inputs["hidden"], inputs["weight"], inputs["targets"], temperature, valid)
    mode, low, high = options.get("importance", ("mask", 0.5, 5.0))
    floor, token_weights = options.get("advantage_floor"), options.get("token_weights")
    loss = torch.zeros((), dtype=torch.float64)
    for n in range(len(logprob)):
        advantage = inputs["teacher_logprobs"][n].item() - logprob[n].item()
        if floor is not None:
            advantage = max(advantage, floor)
        ratio = (logprob[n].detach() - inputs["rollout_logprobs"][n]).exp().item()
        weight = {"mask": ratio if low <= ratio <= high else 0.0, "clip": min(ratio, high), "none": 1.0}[mode]
        weight *= 1.0 if token_weights is None else token_weights[n].item()
        loss = loss - inputs["coefficients"][n] * weight * advantage * logprob[n]
    return loss, logprob


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh leaves ``hidden`` and ``weight`` of ``dtype``; other floats stay fp32, or turn float64 with them."""
    result = {}
    for name, value in inputs.items():
        if name in ("hidden", "weight"):
            result[name] = value.detach().to(dtype).requires_grad_()
        else:
            result[name] = value.double() if dtype == torch.float64 and value.is_floating_point() else value
    return result


def close(actual: Tensor | None, expected: Tensor | None, relative: float) -> None:
    """Within ``relative`` of the expected tensor's largest entry: gradients mix sizes, rounding follows the largest."""
    assert actual is not None and expected is not None
    assert actual.isfinite().all()
    allowed = relative * max(expected.abs().max().item() if expected.numel() else 0.0, 1e-6)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=allowed)


def check_distill(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Loss, log-probabilities and both gradients against the reference, in the dtype's own precision."""
    ours = leaves(inputs, dtype)
    exact = leaves({name: value.detach() for name, value in ours.items()}, torch.float64)  # after rounding to dtype
    loss, logprob = distill_head(**ours, **options)
    (loss * 3.0).backward()
    expected, expected_logprob = reference_loss(exact, {k: v for k, v in options.items() if k != "chunk_tokens"})
    (expected * 3.0).backward()
    assert loss.dtype == logprob.dtype == torch.float32 and loss.dim() == 0 and not logprob.requires_grad
    assert ours["weight"].grad is not None and ours["weight"].grad.dtype == dtype
    close(logprob, expected_logprob, 2e-6)
    # The terms of the loss may cancel; their sizes bound the rounding.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    # bf16 rounds twice, by 2^-8 at most: the gradient as it waits, and that times the upstream 3.
    gradient_tolerance = 2e-5 if dtype == torch.float32 else 2.0**-7
    close(ours["hidden"].grad, exact["hidden"].grad, gradient_tolerance)
    close(ours["weight"].grad, exact["weight"].grad, gradient_tolerance)


# ----------------------------------------------------------------------------------------------------- linear_logprob


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("tokens", "vocab", "width"), SHAPES)
@pytest.mark.parametrize("kinds", [None, 1, 3])
def test_linear_logprob(tokens: int, vocab: int, width: int, temperature: float, kinds: int | None) -> None:
    inputs = problem(tokens, vocab, width)
    generator = torch.Generator().manual_seed(1)
    shape = (tokens,) if kinds is None else (tokens, kinds)
    targets = torch.randint(0, vocab, shape, generator=generator)
    if kinds == 3:
        targets[0] = targets[0, 0]  # a token may be asked for twice
    upstream = torch.randn(shape, generator=generator)
    ours = leaves({k: inputs[k] for k in ("hidden", "weight")}, torch.float32)
    exact = leaves({k: inputs[k] for k in ("hidden", "weight")}, torch.float64)

    logprob, entropy = linear_logprob(**ours, targets=targets, temperature=temperature, chunk_tokens=5)
    (logprob * upstream).sum().backward()
    expected, expected_entropy = reference_logprobs(**exact, targets=targets, temperature=temperature)
    (expected * upstream.double()).sum().backward()
    assert logprob.dtype == entropy.dtype == torch.float32 and logprob.shape == shape and entropy.shape == (tokens,)
    assert logprob.requires_grad and not entropy.requires_grad
    close(logprob, expected, 2e-6)
    close(entropy, expected_entropy, 2e-6)
    close(ours["hidden"].grad, exact["hidden"].grad, 1e-5)
    close(ours["weight"].grad, exact["weight"].grad, 1e-5)


def test_linear_logprob_peaked_rows() -> None:
    """Logits around +-1000 with one near-certain column: no overflow, entropy near 0 without cancellation."""
    inputs = problem(32, 200, 16, peak=300.0)
    hidden, weight, targets = inputs["hidden"], inputs["weight"].requires_grad_(), inputs["targets"]
    targets[::2] = (hidden @ weight.t()).argmax(dim=1)[::2]
    logprob, entropy = linear_logprob(hidden, weight, targets)
    expected, expected_entropy = reference_logprobs(hidden.double(), weight.detach().double(), targets, 1.0)
    close(logprob, expected.detach(), 1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-2, atol=1e-4)
    assert (logprob <= 0.0).all() and (entropy > -1e-6).all()
    logprob.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_linear_logprob_bf16_takes_fp32_logits() -> None:
    inputs = problem(48, 257, 64, peak=8.0)
    ours = leaves({k: inputs[k] for k in ("hidden", "weight")}, torch.bfloat16)
    exact = leaves({k: v.detach() for k, v in ours.items()}, torch.float64)
    logprob, entropy = linear_logprob(**ours, targets=inputs["targets"])
    expected, expected_entropy = reference_logprobs(**exact, targets=inputs["targets"], temperature=1.0)
    torch.testing.assert_close(logprob.double(), expected, rtol=0.0, atol=5e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0.0, atol=5e-5)
    logprob.sum().backward()
    expected.sum().backward()
    for name in ("hidden", "weight"):
        assert ours[name].grad is not None and ours[name].grad.dtype == torch.bfloat16
        close(ours[name].grad, exact[name].grad, 2.0**-8)


def test_phantom_columns_take_no_part() -> None:
    inputs = problem(9, 24, 6)
    weight = inputs["weight"].clone()
    weight[19:] = 1e4  # would win every row
    weight.requires_grad_()
    targets = inputs["targets"] % 19
    logprob, entropy = linear_logprob(inputs["hidden"], weight, targets, valid_vocab_size=19)
    expected, expected_entropy = reference_logprobs(inputs["hidden"], weight.detach(), targets, 1.0, valid=19)
    close(logprob, expected, 2e-6)
    close(entropy, expected_entropy, 2e-6)
    logprob.sum().backward()
    assert weight.grad is not None and weight.grad[19:].eq(0.0).all() and weight.grad[:19].ne(0.0).any()
    impossible, _ = linear_logprob(inputs["hidden"], weight, torch.full_like(targets, 19), valid_vocab_size=19)
    assert impossible.eq(-float("inf")).all()


# ------------------------------------------------------------------------------------------------------- distill_head


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("tokens", "vocab", "width"), SHAPES)
def test_distill_head(tokens: int, vocab: int, width: int, temperature: float) -> None:
    check_distill(problem(tokens, vocab, width), temperature=temperature, chunk_tokens=6)


@pytest.mark.parametrize("importance", [("mask", 0.5, 5.0), ("mask", 0.1, 1.5), ("clip", 0.5, 2.0), ("none", 0.5, 5.0)])
@pytest.mark.parametrize("floor", [None, -0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_distill_head_options(importance: tuple[str, float, float], floor: float | None, weighted: bool) -> None:
    inputs = problem(37, 24, 8, seed=2)
    logprob, _ = reference_logprobs(inputs["hidden"], inputs["weight"], inputs["targets"], 1.0)
    inputs["rollout_logprobs"] = logprob + torch.randn(37, generator=torch.Generator().manual_seed(3))
    inputs["teacher_logprobs"] = logprob + torch.randn(37, generator=torch.Generator().manual_seed(4))
    token_weights = torch.arange(37) % 3 * 0.5 if weighted else None
    check_distill(inputs, importance=importance, advantage_floor=floor, token_weights=token_weights)


def test_distill_head_phantom_columns() -> None:
    inputs = problem(11, 32, 6)
    inputs["weight"][21:] = 1e4
    inputs["targets"] %= 21
    check_distill(inputs, valid_vocab_size=21, temperature=0.7)
    ours = leaves(inputs, torch.float32)
    distill_head(**ours, valid_vocab_size=21)[0].backward()
    assert ours["weight"].grad is not None and ours["weight"].grad[21:].eq(0.0).all()


def test_distill_head_peaked_rows() -> None:
    check_distill(problem(40, 150, 16, peak=20.0, seed=5), importance=("clip", 0.5, 5.0))


@pytest.mark.parametrize("block_bytes", [None, 4 * 64 * 10])
def test_distill_head_bf16(block_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a weight that is widened in blocks of ten rows, the last one short."""
    if block_bytes is not None:
        monkeypatch.setattr(vocab_parallel, "WEIGHT_BLOCK_BYTES", block_bytes)
    check_distill(problem(48, 257, 64, peak=4.0), torch.bfloat16, importance=("clip", 0.5, 5.0), chunk_tokens=20)


@pytest.mark.parametrize("largest", [3.0, 1e-3, 2.0**-40, 2e-38])
def test_narrowing_to_fp16_keeps_small_gradients(largest: float) -> None:
    """As the values that a direct cast would flush: the largest one and what is up to 2^-28 smaller."""
    exponents = torch.arange(0, -28, -1, dtype=torch.float64)
    values = (largest * 2.0**exponents * torch.linspace(0.51, 1.0, 28, dtype=torch.float64).flip(0)).float()
    values = torch.stack([values, -values])[:, values.abs() > 2.0**-126]
    narrow, scale = vocab_parallel.narrowed(values, torch.float16)
    assert narrow.dtype == torch.float16 and scale is not None
    assert torch.frexp(scale).mantissa == 0.5  # a power of two
    torch.testing.assert_close(narrow.double() / scale.double(), values.double(), rtol=2.0**-11, atol=0)
    narrow, scale = vocab_parallel.narrowed(values, torch.bfloat16)
    assert scale is None and torch.equal(narrow, values.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_narrowing_to_fp16_passes_on_what_is_not_finite(bad: float) -> None:
    narrow, scale = vocab_parallel.narrowed(torch.zeros(2, 2), torch.float16)
    assert torch.equal(narrow, torch.zeros(2, 2, dtype=torch.float16)) and scale is not None and scale.isfinite()
    narrow, scale = vocab_parallel.narrowed(torch.tensor([[1.0, bad]]), torch.float16)
    assert scale is not None and not (narrow.float() / scale).isfinite().all()


def emulate_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16-bit operands with an fp32 sum, as CUDA's, on the CPU; other operands are refused."""

    def matrix_product(left: Tensor, right: Tensor) -> Tensor:
        assert left.dtype == right.dtype == torch.float16
        return left.float() @ right.float()

    monkeypatch.setattr(vocab_parallel, "_on_matrix_units", lambda left, right: left.dtype == right.dtype)
    monkeypatch.setattr(vocab_parallel, "_matrix_product", matrix_product)


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_fp16_gradients_do_not_underflow(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With coefficients as of long responses, 1 / (|S| L) and below; the loss scale comes only after them."""
    emulate_matrix_units(monkeypatch)
    inputs = problem(48, 257, 64, peak=4.0)
    inputs["coefficients"] *= size
    ours = leaves(inputs, torch.float16)
    exact = leaves({name: value.detach() for name, value in ours.items()}, torch.float64)
    loss_scale = 1024.0 / size
    (distill_head(**ours, chunk_tokens=20)[0] * loss_scale).backward()
    (reference_loss(exact, {})[0] * loss_scale).backward()
    for name in ("hidden", "weight"):
        close(ours[name].grad, exact[name].grad, 2.0**-10)


def test_distill_head_is_the_fused_camopd_loss() -> None:
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


def test_zero_coefficients_drop_anything() -> None:
    """NaN and infinity in a dropped token's row, teacher, rollout or weight reach neither loss nor gradients."""
    clean, nan, inf = problem(8, 16, 6, seed=7), float("nan"), float("inf")
    clean["coefficients"][[1, 4, 6, 7]] = 0.0
    dirty = {name: value.clone() for name, value in clean.items()}
    dirty["hidden"][1] = nan
    dirty["hidden"][4] = inf
    dirty["teacher_logprobs"][6] = -inf
    dirty["rollout_logprobs"][7] = -inf
    dirty["teacher_logprobs"][7] = nan
    token_weights = torch.ones(8)
    token_weights[1] = nan
    for importance in (("mask", 0.5, 5.0), ("clip", 0.5, 5.0), ("none", 0.5, 5.0)):
        pair = [leaves(inputs, torch.float32) for inputs in (clean, dirty)]
        losses = [
            distill_head(**inputs, importance=importance, token_weights=weights)[0]
            for inputs, weights in zip(pair, (None, token_weights), strict=True)
        ]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == losses[1].item()
        for name in ("hidden", "weight"):
            torch.testing.assert_close(pair[1][name].grad, pair[0][name].grad, rtol=0.0, atol=0.0)
        assert pair[1]["hidden"].grad is not None and pair[1]["hidden"].grad[[1, 4, 6, 7]].eq(0.0).all()


def test_broken_token_that_counts_shows_in_the_loss() -> None:
    inputs = problem(4, 8, 3)
    inputs["hidden"][2] = float("nan")
    for mode in ("mask", "clip", "none"):
        assert distill_head(**inputs, importance=(mode, 0.5, 5.0))[0].isnan()


def test_no_tokens() -> None:
    ours = leaves(problem(0, 8, 3), torch.float32)
    loss, logprob = distill_head(**ours)
    loss.backward()
    assert loss.item() == 0.0 and logprob.shape == (0,)
    assert ours["hidden"].grad is not None and ours["hidden"].grad.shape == (0, 3)
    assert ours["weight"].grad is not None and ours["weight"].grad.eq(0.0).all()
    hidden, weight = (value.detach().requires_grad_() for value in (ours["hidden"], ours["weight"]))
    logprob, entropy = linear_logprob(hidden, weight, torch.zeros(0, 2, dtype=torch.int64))
    logprob.sum().backward()
    assert logprob.shape == (0, 2) and entropy.shape == (0,)
    assert weight.grad is not None and weight.grad.eq(0.0).all()


def test_gradients_are_made_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["megatron_camopd.kernels.distill_head"]  # the package's attribute of that name is the function
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(module, name)

        def call(*args: Tensor) -> Any:
            calls.append(name)
            return original(*args)

        return call

    for name in ("hidden_gradient", "add_weight_gradient"):
        monkeypatch.setattr(module, name, counted(name))
    inputs = problem(5, 9, 3)
    expected = distill_head(**inputs)[0]
    with torch.no_grad():
        loss, _ = distill_head(**leaves(inputs, torch.float32))
    assert calls == [] and not loss.requires_grad and torch.equal(loss, expected)
    distill_head(**(inputs | {"weight": inputs["weight"].clone().requires_grad_()}))[0].backward()
    assert calls == ["add_weight_gradient"]
    hidden = inputs["hidden"].clone().requires_grad_()
    loss = distill_head(**(inputs | {"hidden": hidden}))[0]
    assert calls == ["add_weight_gradient", "hidden_gradient"]
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * first)


def test_chunks_change_nothing_and_runs_repeat_bitwise() -> None:
    inputs = problem(50, 40, 12, seed=8)
    results = []
    for chunk in (None, None, 1, 7, 50, 1000):
        ours = leaves(inputs, torch.float32)
        loss, logprob = distill_head(**ours, chunk_tokens=chunk)
        loss.backward()
        results.append((loss.detach(), logprob, ours["hidden"].grad, ours["weight"].grad))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))  # type: ignore[arg-type]
    for other in results[2:]:
        for actual, expected in zip(other, results[0], strict=True):
            close(actual, expected, 1e-6)


def test_default_chunk_bounds_the_logits() -> None:
    chunks = list(vocab_parallel.token_chunks(1000, 151_936, None))
    rows = chunks[0].stop - chunks[0].start
    assert 32 * 2**20 < rows * 151_936 * 4 <= 64 * 2**20
    assert [n for chunk in chunks for n in range(chunk.start, chunk.stop)] == list(range(1000))
    assert list(vocab_parallel.token_chunks(2, 10**9, None)) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets has shape \(4,\)"),
        ({"coefficients": torch.zeros(5, 1)}, "coefficients has shape"),
        ({"weight": torch.zeros(9, 4)}, r"not \[N, H\]"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"valid_vocab_size": 10}, "valid_vocab_size is 10"),
        ({"valid_vocab_size": 0}, "valid_vocab_size is 0"),
        ({"importance": ("trim", 0.5, 5.0)}, "importance mode is 'trim'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_head(**(problem(5, 9, 3) | change))
    if "targets" in change:
        inputs = problem(5, 9, 3)
        with pytest.raises(ValueError, match="neither"):
            linear_logprob(inputs["hidden"], inputs["weight"], change["targets"])
