"""``distill_head`` on what does not belong there: dropped where a token does not count, else shown or refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels import distill_head
from tests.support.head_problems import BACK_ENDS, exact_leaves, leaves, problem, reference_loss, use_back_end

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # of Triton's interpreter
both_back_ends = pytest.mark.parametrize("back_end", BACK_ENDS)
every_mode = pytest.mark.parametrize("importance", [("mask", 0.5, 5.0), ("clip", 0.5, 5.0), ("none", 0.5, 5.0)])


def run(
    inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of hidden and weight."""
    ours = leaves(inputs, dtype, device)
    loss, _ = distill_head(**ours, **options)
    loss.backward()
    assert ours["hidden"].grad is not None and ours["weight"].grad is not None
    return loss.detach(), ours["hidden"].grad, ours["weight"].grad


def with_values(inputs: dict[str, Tensor], **values: dict[Any, float]) -> dict[str, Tensor]:
    """A copy in which each named tensor holds the given values at the given places."""
    copy = {name: value.clone() for name, value in inputs.items()}
    for name, entries in values.items():
        for place, value in entries.items():
            copy[name][place] = value
    return copy


# --------------------------------------------------------------------------------------------- tokens that do not count


@both_back_ends
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_coefficients_drop_anything(
    back_end: str, importance: tuple[str, float, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, infinity or an impossible id in a dropped token: the other tokens' results do not change by a bit."""
    device = use_back_end(back_end, monkeypatch)
    dropped = [1, 4, 6, 7, 8, 9]
    clean = with_values(problem(10, 16, 6, seed=7), coefficients=dict.fromkeys(dropped, 0.0))
    dirty = with_values(
        clean,
        hidden={1: NAN, 4: INF},
        teacher_logprobs={6: -INF, 7: NAN},
        rollout_logprobs={7: -INF, 1: NAN},
        targets={8: 16, 9: -(2**40)},
    )
    token_weights = torch.ones(10, device=device)
    token_weights[1], token_weights[6] = NAN, INF
    expected = run(clean, device, dtype, importance=importance)
    actual = run(dirty, device, dtype, importance=importance, token_weights=token_weights)
    for ours, reference in zip(actual, expected, strict=True):
        assert torch.equal(ours, reference) and reference.ne(0.0).any()
    assert actual[1][dropped].eq(0.0).all()


@both_back_ends
@every_mode
@pytest.mark.parametrize("through", ["coefficients", "token_weights"])
def test_nothing_counts(
    back_end: str, importance: tuple[str, float, float], through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens are padding: loss and gradients are exactly 0 with NaN in every tensor that belongs to tokens."""
    device = use_back_end(back_end, monkeypatch)
    everywhere = {slice(None): NAN}
    inputs = with_values(
        problem(5, 9, 3), hidden=everywhere, teacher_logprobs=everywhere, rollout_logprobs=everywhere, targets={0: 99}
    )
    if through == "coefficients":
        inputs["coefficients"].zero_()
    token_weights = torch.full((5,), NAN if through == "coefficients" else 0.0, device=device)
    for result in run(inputs, device, importance=importance, token_weights=token_weights, advantage_floor=-0.5):
        assert result.eq(0.0).all()


# --------------------------------------------------------------------------------------------------- tokens that count


@both_back_ends
@every_mode
@pytest.mark.parametrize("target", [16, 15, -1, 2**40])
def test_an_id_outside_the_vocabulary_makes_nan(
    back_end: str, importance: tuple[str, float, float], target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a phantom one, 15 here, and although the importance weight of so unlikely a token would be 0."""
    device = use_back_end(back_end, monkeypatch)
    inputs = with_values(problem(4, 16, 3), targets={slice(None): 3, 2: target})
    loss, hidden, weight = run(inputs, device, importance=importance, valid_vocab_size=15, chunk_tokens=2)
    assert loss.isnan() and hidden[2].isnan().all() and weight[:15].isnan().all() and weight[15].eq(0.0).all()
    assert hidden[[0, 1, 3]].isfinite().all()
    assert torch.equal(*(run(other, device, importance=importance, valid_vocab_size=15)[0] for other in (
        with_values(inputs, coefficients={2: 0.0}), with_values(inputs, coefficients={2: 0.0}, targets={2: 0})
    )))  # fmt: skip


@both_back_ends
@every_mode
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_broken_hidden_state_shows(
    back_end: str, importance: tuple[str, float, float], bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In loss, its own gradient and the weight's; never in other tokens' gradients."""
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(4, 8, 3)
    clean = run(inputs, device, importance=importance)
    loss, hidden, weight = run(with_values(inputs, hidden={(2, 1): bad}), device, importance=importance)
    assert loss.isnan() and hidden[2].isnan().all() and weight.isnan().all()
    assert torch.equal(hidden[[0, 1, 3]], clean[1][[0, 1, 3]])


@both_back_ends
@every_mode
def test_broken_factors_show(
    back_end: str, importance: tuple[str, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = use_back_end(back_end, monkeypatch)
    inputs = problem(4, 8, 3)
    student = reference_loss(exact_leaves(inputs), {})[1].detach().float()
    inputs["rollout_logprobs"] = student  # all ratios are 1: no token is dropped
    for teacher in (NAN, INF, -INF):
        results = run(with_values(inputs, teacher_logprobs={2: teacher}), device, importance=importance)
        assert not any(result.isfinite().all() for result in results)
    token_weights = torch.tensor([1.0, 1.0, NAN, 1.0], device=device)
    for results in (
        run(with_values(inputs, coefficients={2: NAN}), device, importance=importance),
        run(inputs, device, importance=importance, token_weights=token_weights),
    ):
        assert all(result.isnan().any() for result in results)
    results = run(with_values(inputs, rollout_logprobs={2: NAN}), device, importance=importance)
    if importance[0] == "none":  # which does not read them
        assert all(result.isfinite().all() for result in results)
    else:
        assert all(result.isnan().any() for result in results)


@both_back_ends
def test_a_broken_weight_shows(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    for bad in (NAN, INF):
        results = run(with_values(problem(4, 8, 3), weight={(5, 1): bad}), device, importance=("none", 0.5, 5.0))
        assert all(result.isnan().any() for result in results)


@both_back_ends
def test_columns_of_no_probability(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit of -inf takes no part while it is nobody's target; as a target it is impossible."""
    device = use_back_end(back_end, monkeypatch)
    inputs = with_values(problem(4, 8, 1), hidden={slice(None): 1.5}, targets={slice(None): 2}, weight={5: -INF})
    without = {name: torch.cat([value[:5], value[6:]]) if name == "weight" else value for name, value in inputs.items()}
    options = {"importance": ("none", 0.5, 5.0)}
    loss, _, weight = run(inputs, device, **options)
    expected_loss, _, expected = run(without, device, **options)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(weight[[0, 1, 2, 3, 4, 6, 7]], expected)
    assert weight[5].eq(0.0).all()
    for importance in ("mask", "clip", "none"):
        assert run(with_values(inputs, targets={1: 5}), device, importance=(importance, 0.5, 5.0))[0].isnan()


# ------------------------------------------------------------------------------------------------------------- no input


@both_back_ends
def test_no_tokens(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_back_end(back_end, monkeypatch)
    ours, buffer = leaves(problem(0, 8, 3), torch.float32, device), torch.ones(8, 3, device=device)
    loss, logprob, metrics = distill_head(**ours, token_metrics=True)
    loss.backward()
    assert loss.item() == 0.0 and logprob.shape == (0,) and all(value.shape == (0,) for value in metrics)
    assert ours["hidden"].grad is not None and ours["hidden"].grad.shape == (0, 3)
    assert ours["weight"].grad is not None and ours["weight"].grad.eq(0.0).all()
    distill_head(**ours, weight_gradient=buffer)[0].backward()
    assert buffer.eq(1.0).all()


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(5, 3).double()}, TypeError, "hidden is torch.float64; it must be float32"),
        ({"hidden": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"weight": torch.zeros(9, 3).double()}, TypeError, "weight is torch.float64"),
        ({"targets": torch.zeros(5)}, TypeError, "targets are torch.float32; vocabulary ids are int64"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, TypeError, "targets are torch.int32"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"targets \(4,\) is neither \[N\] nor"),
        (
            {"targets": torch.zeros(5, 1, dtype=torch.int64)},
            ValueError,
            r"targets has shape \(5, 1\); \(5,\) is expected",
        ),
        ({"teacher_logprobs": torch.zeros(6)}, ValueError, r"teacher_logprobs has shape \(6,\)"),
        ({"rollout_logprobs": torch.zeros(())}, ValueError, "rollout_logprobs has shape"),
        ({"coefficients": torch.zeros(5, 1)}, ValueError, "coefficients has shape"),
        ({"token_weights": torch.zeros(1)}, ValueError, "token_weights has shape"),
        ({"weight": torch.zeros(9, 4)}, ValueError, r"not \[N, H\] and \[V, H\]"),
        ({"hidden": torch.zeros(5, 1, 3)}, ValueError, r"not \[N, H\] and \[V, H\]"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be positive"),
        ({"temperature": INF}, ValueError, "temperature is inf"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0; it must be at least 1"),
        ({"valid_vocab_size": 10}, ValueError, "valid_vocab_size is 10; the weights hold 9 columns"),
        ({"valid_vocab_size": 0}, ValueError, "valid_vocab_size is 0"),
        (
            {"importance": ("trim", 0.5, 5.0)},
            ValueError,
            "importance mode is 'trim'; it must be one of none, mask, clip",
        ),
        ({"importance": ("mask", 5.0, 0.5)}, ValueError, "importance limits are 5.0 and 0.5"),
        ({"importance": ("mask", NAN, 5.0)}, ValueError, "importance limits are nan and 5.0"),
        ({"importance": ("clip", 0.5, -1.0)}, ValueError, "importance limits are 0.5 and -1.0"),
        ({"weight_gradient": torch.zeros(9, 3), "loss_gradient": torch.ones(2)}, ValueError, "loss_gradient has shape"),
        ({"weight_gradient": torch.zeros(9, 3).bfloat16()}, ValueError, "weight_gradient is torch.bfloat16"),
        ({"weight_gradient": torch.zeros(8, 3)}, ValueError, r"it must be torch.float32 \(9, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        distill_head(**(problem(5, 9, 3) | change))
