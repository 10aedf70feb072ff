"""The head's three matrix products, and the 16-bit numbers that go into them, against float64."""

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels import products
from tests.support.head_problems import close, emulate_matrix_units

NARROW = [torch.bfloat16, torch.float16]
TOKENS, VOCAB, WIDTH = 13, 1031, 17  # two whole tiles of columns on the CPU, and seven columns


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight, and a gradient of the logits as a row kernel leaves it: fp32, with gaps between its rows."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator).to(dtype) for n in (TOKENS, VOCAB))
    grad_logits = products.empty_logits(TOKENS, VOCAB, torch.device("cpu"))
    return hidden, weight, grad_logits.copy_(1e-3 * torch.randn(TOKENS, VOCAB, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("on_units", [False, True])
def test_products(dtype: torch.dtype, on_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 sums of the operands as they are; on matrix units the gradient is rounded to their 16 bits first."""
    if on_units:
        emulate_matrix_units(monkeypatch)
    hidden, weight, grad_logits = operands(dtype)
    logits = products.logits_into(products.empty_logits(TOKENS, VOCAB, hidden.device), hidden, weight)
    assert logits.dtype == torch.float32
    close(logits, hidden.double() @ weight.double().t(), 1e-6)

    # The last products are sums over many numbers of both signs: compare with what their sizes allow.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0) if on_units else 0.0
    assert products.gradient_dtype(hidden, weight) == (dtype if on_units and dtype in NARROW else torch.float32)
    held = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))
    total, grad_hidden = held.clone(), torch.full((TOKENS, WIDTH), float("nan"))
    products.hidden_gradient_into(grad_hidden, grad_logits, weight)
    products.add_weight_gradient(total, grad_logits, hidden)
    exact = grad_logits.double()
    for actual, left, right, start in (
        (grad_hidden, exact, weight.double(), torch.zeros(())),
        (total, exact.t(), hidden.double(), held.double()),
    ):
        expected = start + left @ right
        allowed = (rounding + 1e-6) * (left.abs() @ right.abs()) + 1e-6 * expected.abs()
        assert ((actual.double() - expected).abs() <= allowed).all()


def test_products_of_a_gradient_in_place_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of each row of logits, as Triton writes it: the same bits as from a copy."""
    emulate_matrix_units(monkeypatch)
    hidden, weight, grad_logits = operands(torch.bfloat16)
    copy = grad_logits.bfloat16()
    in_place = grad_logits.view(torch.bfloat16)[:, :VOCAB].copy_(copy)
    results = []
    for gradient in (copy, in_place):
        total = products.hidden_gradient_into(torch.empty(TOKENS, WIDTH), gradient, weight)
        other = torch.ones(VOCAB, WIDTH)
        products.add_weight_gradient(other, gradient, hidden)
        results.append((total, other))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("width", [1, 63, 64, 65, 151_936])
def test_rows_of_logits_are_aligned(width: int) -> None:
    logits = products.empty_logits(3, width, torch.device("cpu"))
    assert logits.shape == (3, width) and logits.dtype == torch.float32
    assert logits.stride(1) == 1 and logits.stride(0) * 4 % 256 == 0 and logits.stride(0) < width + 64


# ------------------------------------------------------------------------------------------------------------ narrowing


@pytest.mark.parametrize("largest", [3.0, 1e-3, 2.0**-40, 2e-38])
def test_narrowing_to_fp16_keeps_small_gradients(largest: float) -> None:
    """Make values that a direct cast would flush: the largest one and what is up to 2^-28 smaller."""
    exponents = torch.arange(0, -28, -1, dtype=torch.float64)
    values = (largest * 2.0**exponents * torch.linspace(0.51, 1.0, 28, dtype=torch.float64).flip(0)).float()
    values = torch.stack([values, -values])[:, values.abs() > 2.0**-126]
    narrow, scale = products.narrowed(values, torch.float16)
    assert narrow.dtype == torch.float16 and scale is not None
    assert torch.frexp(scale).mantissa == 0.5  # a power of two
    torch.testing.assert_close(narrow.double() / scale.double(), values.double(), rtol=2.0**-11, atol=0)
    narrow, scale = products.narrowed(values, torch.bfloat16)
    assert scale is None and torch.equal(narrow, values.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_narrowing_to_fp16_passes_on_what_is_not_finite(bad: float) -> None:
    narrow, scale = products.narrowed(torch.zeros(2, 2), torch.float16)
    assert torch.equal(narrow, torch.zeros(2, 2, dtype=torch.float16)) and scale is not None and scale.isfinite()
    narrow, scale = products.narrowed(torch.tensor([[1.0, bad]]), torch.float16)
    assert scale is not None and not (narrow.float() / scale).isfinite().all()
