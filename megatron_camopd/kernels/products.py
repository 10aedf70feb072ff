"""The matrix products of the head, with fp32 results whatever the operands are.

Choice made: logits are fp32 (bf16 logits err by up to 0.1 nat on peaked rows, as much as the gaps to be measured). On
CUDA the matrix units take 16-bit operands and accumulate in fp32; elsewhere the operands are widened, the weight one
block of rows at a time so that it is never copied whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Columns of one product on CPU. Its result is still in the cache when the row operations read it, and MKL is up to a
# fifth faster on such blocks than on 150,000 columns at once.
CPU_TILE_COLUMNS = 512
WIDENED_BLOCK_BYTES = 16 * 2**20  # fp32 copy of one block of 16-bit weight rows


def tile_columns(width: int, device: torch.device) -> int:
    """Columns that are best multiplied at once: all on CUDA."""
    return max(width, 1) if device.type == "cuda" else min(max(width, 1), CPU_TILE_COLUMNS)


def empty_logits(tokens: int, width: int, device: torch.device) -> Tensor:
    """Uninitialised [tokens, width] fp32, rows 256 bytes apart or a multiple of it: vector loads stay aligned."""
    return torch.empty(tokens, -(-width // 64) * 64, dtype=torch.float32, device=device)[:, :width]


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """``out`` [C, V] fp32 = hidden [C, H] times weight [V, H] transposed."""
    if on_matrix_units(hidden, weight):
        return _narrow_product(hidden, weight.t(), out)
    wide, step = hidden.float(), tile_columns(weight.shape[0], weight.device)
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        torch.mm(wide, weight[block].float().t(), out=out[:, block])
    return out


def hidden_gradient_into(out: Tensor, grad_logits: Tensor, weight: Tensor) -> Tensor:
    """``out`` [C, H] fp32 = grad_logits [C, V] times weight [V, H]: this rank's part of the sum over the vocabulary."""
    if on_matrix_units(weight, weight):
        narrow, scale = narrowed(grad_logits, weight.dtype)
        _narrow_product(narrow, weight, out)
        return out if scale is None else out.div_(scale)
    out.zero_()
    for block, values in _widened_blocks(weight):
        out.addmm_(grad_logits[:, block], values)
    return out


def add_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total [V, H] fp32 += grad_logits [C, V] transposed times hidden [C, H]; with fp16, one more buffer of it."""
    if not on_matrix_units(hidden, hidden):
        total.addmm_(grad_logits.t(), hidden.float())
        return
    narrow, scale = narrowed(grad_logits, hidden.dtype)
    if scale is None:
        torch.addmm(total, narrow.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total += _narrow_product(narrow.t(), hidden, torch.empty_like(total)).div_(scale)


def on_matrix_units(left: Tensor, right: Tensor) -> bool:
    """Whether both are of one 16-bit dtype on a device that multiplies them with an fp32 result."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)


def gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """In what dtype the products below want the gradient of the logits: 16 bits only where both operands have them."""
    return hidden.dtype if on_matrix_units(hidden, weight) else torch.float32


def narrowed(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``values`` (not empty) times a power of two in the 16-bit ``dtype``, and that scale [] fp32 (None: 1).

    bf16 has the exponents of fp32. fp16 ends at 6e-8, and no loss scale has lifted these gradients yet: there the
    largest magnitude is brought to [2^14, 2^15), and all within 2^-28 of it keep full precision. Dividing an fp32
    product by the scale is exact. The scale stays on the device: reading it would wait for the queue.
    """
    if dtype != torch.float16:
        return values.to(dtype), None
    exponent = torch.frexp(values.abs().amax()).exponent
    scale = torch.ldexp(values.new_ones(()), (15 - exponent).clamp(-126, 127))
    return (values * scale).to(dtype), scale


def _narrow_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out [M, N] fp32 = left [M, K] times right [K, N], both of one 16-bit dtype on CUDA."""
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _widened_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of ``weight`` in fp32: one view when it is fp32 already, else small copies."""
    rows = weight.shape[0]
    step = max(rows, 1) if weight.dtype == torch.float32 else max(1, WIDENED_BLOCK_BYTES // (4 * weight.shape[1]))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        yield block, weight[block].float()
