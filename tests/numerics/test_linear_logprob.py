"""``linear_logprob`` against float64: whole logits, and autograd does the rest. On both back ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels import linear_logprob, products, top_ids
from tests.support.head_problems import (
    BACK_ENDS,
    close,
    exact_leaves,
    leaves,
    problem,
    reference_logprobs,
    use_back_end,
)

NAN, INF = float("nan"), float("inf")
SHAPES = [(1, 3, 2), (7, 13, 5), (37, 129, 33), (64, 1543, 48)]  # N tokens, V columns, H; 1543 is prime, and four tiles
EVERY_SHAPE = [("torch", *shape) for shape in SHAPES] + [("triton", *shape) for shape in SHAPES[:3]]
both_back_ends = pytest.mark.parametrize("back_end", BACK_ENDS)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # of Triton's interpreter


def head_of(inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return leaves({name: inputs[name] for name in ("hidden", "weight")}, dtype, device)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("back_end", "tokens", "vocab", "width"), EVERY_SHAPE)
@pytest.mark.parametrize("kinds", [None, 1, 3])
def test_values_and_gradients(
    back_end: str,
    tokens: int,
    vocab: int,
    width: int,
    temperature: float,
    kinds: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = use_back_end(back_end, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    shape = (tokens,) if kinds is None else (tokens, kinds)
    targets = torch.randint(0, vocab, shape, generator=generator)
    if kinds == 3:
        targets[0] = targets[0, 0]  # a token may be asked for twice
    upstream = torch.randn(shape, generator=generator)
    ours = head_of(problem(tokens, vocab, width), torch.float32, device)
    exact = exact_leaves(ours)

    logprob, entropy = linear_logprob(**ours, targets=targets.to(device), temperature=temperature, chunk_tokens=5)
    (logprob * upstream.to(device)).sum().backward()
    expected, expected_entropy = reference_logprobs(**exact, targets=targets, temperature=temperature)
    (expected * upstream.double()).sum().backward()
    assert logprob.dtype == entropy.dtype == torch.float32 and logprob.shape == shape and entropy.shape == (tokens,)
    assert logprob.requires_grad and not entropy.requires_grad
    close(logprob, expected, 2e-6)
    close(entropy, expected_entropy, 2e-6)
    close(ours["hidden"].grad, exact["hidden"].grad, 1e-5)
    close(ours["weight"].grad, exact["weight"].grad, 1e-5)


# Allowed: error of a log-probability and the entropy in nats, relative error of a gradient.
@both_back_ends
@pytest.mark.parametrize(
    ("dtype", "nats", "relative"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 5e-5, 1e-2), (torch.float16, 5e-5, 1e-2)],
)
def test_peaked_rows(
    back_end: str, dtype: torch.dtype, nats: float, relative: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits up to +-40, most rows with most of their mass on one column; half of the targets are that column."""
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(24, 1543, 64, peak=8.5)
    ours = head_of(inputs, dtype, device)
    exact = exact_leaves(ours)
    logits = (exact["hidden"] @ exact["weight"].t()).detach()
    targets = inputs["targets"]
    targets[::2] = logits.argmax(dim=1)[::2]
    assert 38.0 < logits.abs().max() < 45.0 and torch.softmax(logits, dim=1).amax(dim=1).median() > 0.5

    logprob, entropy = linear_logprob(**ours, targets=targets.to(device))
    expected, expected_entropy = reference_logprobs(**exact, targets=targets, temperature=1.0)
    torch.testing.assert_close(logprob.cpu().double(), expected, rtol=0.0, atol=nats)
    torch.testing.assert_close(entropy.cpu().double(), expected_entropy, rtol=0.0, atol=nats)
    logprob.sum().backward()
    expected.sum().backward()
    for name in ("hidden", "weight"):
        gradient = ours[name].grad
        assert gradient is not None and gradient.dtype == dtype
        close(gradient, exact[name].grad, relative)


@both_back_ends
def test_logits_of_a_thousand(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No overflow; entropy near 0 without cancellation."""
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(32, 200, 16, peak=300.0)
    ours = head_of(inputs, torch.float32, device)
    exact = exact_leaves(ours)
    targets = inputs["targets"]
    targets[::2] = (exact["hidden"] @ exact["weight"].t()).argmax(dim=1)[::2]
    logprob, entropy = linear_logprob(**ours, targets=targets.to(device))
    expected, expected_entropy = reference_logprobs(**exact, targets=targets, temperature=1.0)
    close(logprob, expected, 1e-6)
    torch.testing.assert_close(entropy.cpu().double(), expected_entropy, rtol=2e-2, atol=1e-4)
    assert (logprob <= 0.0).all() and (entropy > -1e-6).all()
    logprob.sum().backward()
    assert ours["weight"].grad is not None and ours["weight"].grad.isfinite().all()


@both_back_ends
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_hidden_and_weight_of_different_dtypes(
    back_end: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(9, 24, 6)
    hidden = inputs["hidden"].to(device, hidden_dtype).requires_grad_()
    weight = inputs["weight"].to(device, weight_dtype).requires_grad_()
    exact = exact_leaves({"hidden": hidden, "weight": weight})
    logprob, _ = linear_logprob(hidden, weight, inputs["targets"].to(device))
    expected, _ = reference_logprobs(**exact, targets=inputs["targets"], temperature=1.0)
    close(logprob, expected, 2e-6)
    logprob.sum().backward()
    expected.sum().backward()
    for value, name in ((hidden, "hidden"), (weight, "weight")):
        assert value.grad is not None and value.grad.dtype == value.dtype
        close(value.grad, exact[name].grad, 1e-2)


@both_back_ends
def test_phantom_columns_take_no_part(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(9, 24, 6)
    inputs["weight"][19:] = 1e4  # would win every row
    ours = head_of(inputs, torch.float32, device)
    targets = inputs["targets"] % 19
    logprob, entropy, ids = linear_logprob(**ours, targets=targets.to(device), valid_vocab_size=19, top_k=19)
    expected, expected_entropy = reference_logprobs(**exact_leaves(ours), targets=targets, temperature=1.0, valid=19)
    close(logprob, expected, 2e-6)
    close(entropy, expected_entropy, 2e-6)
    assert torch.equal(ids.sort(dim=1).values.cpu(), torch.arange(19).expand(9, -1))
    logprob.sum().backward()
    gradient = ours["weight"].grad
    assert gradient is not None and gradient[19:].eq(0.0).all() and gradient[:19].ne(0.0).any()


# ------------------------------------------------------------------------------------------------------ the largest ids


def integer_problem(tokens: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden and weight of small integers: logits are exact, and so often equal that ties decide most places."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-2, 3, (n, 3), generator=generator).float() for n in (tokens, vocab))


@both_back_ends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab", "top_k", "tile"), [(7, 1, 512), (7, 7, 512), (53, 9, 8), (53, 53, 8), (1543, 600, 512)]
)
def test_largest_ids(
    back_end: str, vocab: int, top_k: int, tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argmax first, the smaller id among equals; over tiles of which none holds ``top_k`` columns, too."""
    device = use_back_end(back_end, monkeypatch)
    monkeypatch.setattr(products, "CPU_TILE_COLUMNS", tile)
    hidden, weight = (value.to(device, dtype) for value in integer_problem(6, vocab))
    targets = torch.zeros(6, dtype=torch.int64, device=device)
    plain = linear_logprob(hidden, weight, targets, temperature=0.7, chunk_tokens=4)
    *others, ids = linear_logprob(hidden, weight, targets, temperature=0.7, chunk_tokens=4, top_k=top_k)
    logits = hidden.cpu().double() @ weight.cpu().double().t()
    assert ids.dtype == torch.int64 and len(logits[0].unique()) < vocab
    assert torch.equal(ids.cpu(), logits.argsort(dim=1, descending=True, stable=True)[:, :top_k])
    assert all(torch.equal(a, b) for a, b in zip(plain, others, strict=True))


def test_order_of_unusual_logits() -> None:
    logits = torch.tensor([[-0.0, -INF, 0.0, 1e-42, INF, -1e-42, -3e38, INF]])
    keys = top_ids.largest(logits, 100, 8)
    assert top_ids.merge(keys[None]).tolist() == [[104, 107, 103, 100, 102, 105, 106, 101]]


def test_largest_ids_of_a_broken_row_are_ids() -> None:
    hidden, weight = integer_problem(3, 23)
    expected = linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), top_k=23)[2]
    for bad in (NAN, -NAN, INF):
        hidden[1] = bad
        ids = linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), top_k=23)[2]
        assert torch.equal(ids[[0, 2]], expected[[0, 2]])
        assert torch.equal(ids[1].sort().values, torch.arange(23))


@pytest.mark.parametrize(("top_k", "options"), [(8, {}), (-1, {}), (6, {"valid_vocab_size": 5})])
def test_more_ids_than_there_are(top_k: int, options: dict[str, int]) -> None:
    hidden, weight = integer_problem(3, 7)
    with pytest.raises(ValueError, match=f"top_k is {top_k}; it must lie between 0 and the vocabulary size"):
        linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), top_k=top_k, **options)  # type: ignore[call-overload]


# ----------------------------------------------------------------------------------------------------------- bad input


@both_back_ends
def test_ids_outside_the_vocabulary(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(6, 24, 6)
    ours = head_of(inputs, torch.float32, device)
    targets = torch.tensor([[-1, 0], [19, 1], [23, 2], [24, 3], [2**62, 4], [-(2**63), 5]])
    logprob, entropy = linear_logprob(**ours, targets=targets.to(device), valid_vocab_size=19)
    assert logprob[:, 0].eq(-INF).all()
    expected = reference_logprobs(**exact_leaves(ours), targets=targets[:, 1:], temperature=1.0, valid=19)
    close(logprob[:, 1:], expected[0], 2e-6)
    close(entropy, expected[1], 2e-6)


@both_back_ends
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_broken_rows_stay_alone(back_end: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN for a row with NaN or infinity, and nothing of it in other rows or, without upstream, in the weight."""
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(5, 24, 6)
    targets = inputs["targets"].to(device)
    clean, broken = (head_of(inputs, torch.float32, device) for _ in range(2))
    with torch.no_grad():
        broken["hidden"][3, 2] = bad
    results = [linear_logprob(**both, targets=targets) for both in (clean, broken)]
    good = [0, 1, 2, 4]
    for value, expected in zip(results[1], results[0], strict=True):
        assert value[3].isnan() and torch.equal(value[good], expected[good])
    for logprob, _ in results:
        logprob[good].sum().backward()
    for name in ("hidden", "weight"):
        assert torch.equal(broken[name].grad, clean[name].grad)


@both_back_ends
def test_columns_of_no_probability(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit of -inf is a column that cannot be drawn; a row of nothing else has no distribution."""
    device = use_back_end(back_end, monkeypatch)
    hidden = torch.tensor([[1.0], [2.0], [3.0]], device=device)
    weight = torch.tensor([[0.5], [-INF], [-0.5], [-INF]], device=device)
    targets = torch.tensor([[0, 1, 2]], device=device).expand(3, -1)
    logprob, entropy, ids = linear_logprob(hidden, weight, targets, top_k=4)
    table = torch.log_softmax(torch.tensor([[0.5, -0.5], [1.0, -1.0], [1.5, -1.5]]).double(), dim=1)
    close(logprob[:, [0, 2]], table, 1e-6)
    close(entropy, -(table.exp() * table).sum(dim=1), 1e-6)
    assert logprob[:, 1].eq(-INF).all() and ids.tolist() == [[0, 2, 1, 3]] * 3
    nothing = linear_logprob(hidden, torch.full_like(weight, -INF), targets)
    assert all(value.isnan().all() for value in nothing)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(5, 3).double()}, TypeError, "hidden is torch.float64"),
        ({"weight": torch.zeros(9, 3, dtype=torch.int8)}, TypeError, "weight is torch.int8"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, TypeError, "targets are torch.int32"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"targets \(4,\) is neither \[N\] nor \[N, K\]"),
        ({"targets": torch.zeros(5, 1, 1, dtype=torch.int64)}, ValueError, "neither"),
        ({"weight": torch.zeros(9, 4)}, ValueError, r"not \[N, H\] and \[V, H\]"),
        ({"hidden": torch.zeros(1, 5, 3)}, ValueError, r"not \[N, H\] and \[V, H\]"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": NAN}, ValueError, "temperature is nan"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0"),
        ({"valid_vocab_size": 10}, ValueError, "valid_vocab_size is 10; the weights hold 9 columns"),
        ({"valid_vocab_size": 0}, ValueError, "valid_vocab_size is 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: problem(5, 9, 3)[name] for name in ("hidden", "weight", "targets")}
    with pytest.raises(error, match=message):
        linear_logprob(**(inputs | change))


@both_back_ends
@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("kinds", [None, 3])
def test_no_tokens(back_end: str, kinds: int | None, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of a context-parallel group may hold no position that predicts a token, or micro-batches of padding."""
    device = use_back_end(back_end, monkeypatch)
    ours = head_of(problem(0, 8, 3), torch.float32, device)
    shape = (0,) if kinds is None else (0, kinds)
    targets = torch.zeros(shape, dtype=torch.int64, device=device)
    logprob, entropy, *top = linear_logprob(**ours, targets=targets, top_k=top_k)
    assert logprob.shape == shape and entropy.shape == (0,) and [ids.shape for ids in top] == [(0, 2)] * (top_k > 0)
    logprob.sum().backward()
    assert ours["hidden"].grad is not None and ours["hidden"].grad.shape == (0, 3)
    assert ours["weight"].grad is not None and ours["weight"].grad.eq(0.0).all()
