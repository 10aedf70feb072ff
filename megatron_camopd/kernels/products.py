"""Matrix products of the head, with fp32 results for operands of any dtype.

Design choice: logits are fp32. (bf16 logits are off by up to 0.1 nat on peaked rows, as much as the gaps that are to be
measured.) On CUDA, tensor cores take 16-bit operands and accumulate in fp32. Elsewhere the operands are converted to
fp32, the weight one block of rows at a time so that there is never an fp32 copy of all of it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Columns of one product on the CPU. Its result is still in the cache when the row operations read it, and MKL is up to
# a fifth faster on such tiles than on 150,000 columns at once.
CPU_TILE_COLUMNS = 512
WIDENED_BLOCK_BYTES = 16 * 2**20  # fp32 copy of one block of 16-bit weight rows


def tile_columns(width: int, device: torch.device) -> int:
    """Return how many of ``width`` columns to multiply at once: all of them on CUDA."""
    return max(width, 1) if device.type == "cuda" else min(max(width, 1), CPU_TILE_COLUMNS)


def empty_logits(tokens: int, width: int, device: torch.device) -> Tensor:
    """Return an uninitialised [tokens, width] fp32 tensor whose row stride is a multiple of 256 bytes.

    Vectorised loads of each row are then aligned.
    """
    return torch.empty(tokens, -(-width // 64) * 64, dtype=torch.float32, device=device)[:, :width]


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute ``out`` [C, V] fp32 = hidden [C, H] times weight [V, H] transposed; return ``out``."""
    if on_tensor_cores(hidden, weight):
        return _narrow_product(hidden, weight.t(), out)
    wide, step = hidden.float(), tile_columns(weight.shape[0], weight.device)
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        torch.mm(wide, weight[block].float().t(), out=out[:, block])
    return out


def hidden_gradient_into(out: Tensor, grad_logits: Tensor, weight: Tensor) -> Tensor:
    """Compute ``out`` [C, H] fp32 = grad_logits [C, V] times weight [V, H]; return ``out``.

    The result sums over this rank's columns of the vocabulary only.
    """
    if on_tensor_cores(weight, weight):
        narrow, scale = narrowed(grad_logits, weight.dtype)
        _narrow_product(narrow, weight, out)
        return out if scale is None else out.div_(scale)
    out.zero_()
    for block, values in _widened_blocks(weight):
        out.addmm_(grad_logits[:, block], values)
    return out


def add_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits [C, V] transposed times hidden [C, H] to ``total`` [V, H] fp32.

    On tensor cores, fp16 operands need a temporary buffer as large as ``total``.
    """
    if not on_tensor_cores(hidden, hidden):
        total.addmm_(grad_logits.t(), hidden.float())
        return
    narrow, scale = narrowed(grad_logits, hidden.dtype)
    if scale is None:
        torch.addmm(total, narrow.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total += _narrow_product(narrow.t(), hidden, torch.empty_like(total)).div_(scale)


def on_tensor_cores(left: Tensor, right: Tensor) -> bool:
    """Return whether both operands have the same 16-bit dtype and are on CUDA, so that tensor cores multiply them."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)


def gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which these products take the gradient of the logits: 16 bits on tensor cores, else fp32."""
    return hidden.dtype if on_tensor_cores(hidden, weight) else torch.float32


def narrowed(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Convert ``values`` (not empty) to a 16-bit ``dtype``, multiplied by a power of two where the range needs it.

    bf16 has the exponent range of fp32 and needs no scale. fp16 underflows below 6e-8, and these gradients have not
    been multiplied by a loss scale yet. Hence the scale brings the largest magnitude to [2^14, 2^15); values down to
    2^-28 of the largest keep full precision. Dividing an fp32 product by the scale is exact.

    Returns:
        (scaled values; scale, fp32 scalar, or None for 1). The scale stays on the device: reading it would synchronise.
    """
    if dtype != torch.float16:
        return values.to(dtype), None
    exponent = torch.frexp(values.abs().amax()).exponent
    scale = torch.ldexp(values.new_ones(()), (15 - exponent).clamp(-126, 127))
    return (values * scale).to(dtype), scale


def _narrow_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Compute ``out`` [M, N] fp32 = left [M, K] times right [K, N], both of the same 16-bit dtype and on CUDA."""
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _widened_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of ``weight`` in fp32 with their slices: one view if it is fp32 already, else copies."""
    rows = weight.shape[0]
    step = max(rows, 1) if weight.dtype == torch.float32 else max(1, WIDENED_BLOCK_BYTES // (4 * weight.shape[1]))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        yield block, weight[block].float()
