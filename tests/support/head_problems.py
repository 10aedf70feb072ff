"""Problems for the output head, their float64 references, and the two back ends of its row operations."""

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels import products, rows_torch

BACK_ENDS = ["torch", "triton"]
# Where the operations look their back end up; the package's attributes of these names are the functions.
HEADS = [f"megatron_camopd.kernels.{name}" for name in ("distill_head", "linear_logprob", "sample_ids")]


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


def on_policy_problem(tokens: int, vocab: int, width: int, **options: Any) -> dict[str, Tensor]:
    """Make a problem with teacher and rollout near the student (ratios 9 to 0.15), with gaps of both signs.

    No ratio is near a limit in use, so that rounding cannot carry it across.
    """
    inputs = problem(tokens, vocab, width, **options)
    logprob, _ = reference_logprobs(inputs["hidden"].double(), inputs["weight"].double(), inputs["targets"], 1.0)
    ratios = torch.tensor([9.0, 1.5, 0.9, 0.6, 0.15], dtype=torch.float64)
    gaps = torch.tensor([0.7, -0.2, -3.0, 1.1, 0.05, -0.9, 2.0], dtype=torch.float64)
    places = torch.arange(tokens)
    inputs["rollout_logprobs"] = (logprob - ratios[places % 5].log()).float()
    inputs["teacher_logprobs"] = (logprob + gaps[places % 7]).float()
    return inputs


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


def leaves(
    inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Fresh leaves ``hidden`` and ``weight`` of ``dtype``; other floats stay fp32, or turn float64 with them."""
    result = {}
    for name, value in inputs.items():
        value = value.detach().to(device or value.device)
        if name in ("hidden", "weight"):
            result[name] = value.to(dtype, copy=True).requires_grad_()
        else:
            result[name] = value.double() if dtype == torch.float64 and value.is_floating_point() else value
    return result


def exact_leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, after what rounding they have seen, as float64 leaves on the CPU."""
    return leaves(inputs, torch.float64, "cpu")


def close(actual: Tensor | None, expected: Tensor | None, relative: float) -> None:
    """Within ``relative`` of the expected tensor's largest entry: gradients mix sizes, rounding follows the largest."""
    assert actual is not None and expected is not None
    assert actual.isfinite().all()
    allowed = relative * max(expected.abs().max().item() if expected.numel() else 0.0, 1e-6)
    torch.testing.assert_close(actual.detach().cpu().double(), expected.detach().double(), rtol=0.0, atol=allowed)


def row_device(back_end: str) -> torch.device:
    """Return where a back end's row operations run here: Triton on the GPU if there is one, else in its interpreter."""
    return torch.device("cuda" if back_end == "triton" and torch.cuda.is_available() else "cpu")


def row_back_end(back_end: str) -> ModuleType:
    """The row operations of a back end; the test is skipped where Triton cannot run."""
    if back_end == "torch":
        return rows_torch
    if reason := triton_is_unusable():
        pytest.skip(reason)
    return triton_rows()


def triton_is_unusable() -> str:
    """Why the Triton back end runs neither on a GPU nor in the interpreter; "" where it does."""
    try:
        import numpy
        import triton
    except ImportError as error:
        return f"needs {error.name}"
    triton_version, numpy_version = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy))
    if not torch.cuda.is_available() and triton_version < (3, 7) and numpy_version >= (2, 5):
        return "the loops of Triton 3.6's interpreter need numpy < 2.5"
    return ""


@functools.cache
def triton_rows() -> ModuleType:
    """``rows_triton``, for the GPU or, without one, for the interpreter.

    Whether Triton interprets is settled when its functions are decorated, those of its own library included, and other
    tests have imported that long before: so this module gets a second copy of Triton, and the rest keeps the first.
    """
    name = "megatron_camopd.kernels.rows_triton"
    if torch.cuda.is_available():
        return importlib.import_module(name)

    def imported() -> list[str]:
        return [module for module in sys.modules if module.split(".")[0] == "triton" and "._C" not in module]

    first = {module: sys.modules.pop(module) for module in imported()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        rows_triton = importlib.import_module(name)
    for module in imported():
        del sys.modules[module]
    sys.modules.update(first)
    return rows_triton


def use_back_end(back_end: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Make the head operations of this test use the back end; tensors belong on the device returned.

    With Triton in its interpreter the products of 16-bit tensors are a GPU's, too: the path of a GPU, on the CPU.
    """
    operations, device = row_back_end(back_end), row_device(back_end)
    for head in HEADS:
        monkeypatch.setattr(sys.modules[head], "row_operations", lambda device_type: operations)
    if back_end == "triton" and device.type == "cpu":
        emulate_matrix_units(monkeypatch)
    return device


def emulate_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of two tensors of one 16-bit dtype with an fp32 sum, as CUDA's, on the CPU; others are refused there."""
    narrow = (torch.bfloat16, torch.float16)

    def mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        assert left.dtype == right.dtype and left.dtype in narrow and out.dtype == torch.float32
        return torch.mm(left.float(), right.float(), out=out)

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert left.dtype == right.dtype and left.dtype in narrow and total.dtype == out_dtype == torch.float32
        return torch.add(total, torch.mm(left.float(), right.float()), out=out)

    def units(left: Tensor, right: Tensor) -> bool:
        return left.dtype == right.dtype and left.dtype in narrow

    monkeypatch.setattr(products, "on_tensor_cores", units)
    monkeypatch.setattr(products, "_narrow_product", mm)
    monkeypatch.setattr(torch, "addmm", addmm)  # with out_dtype it has no CPU kernel
