"""Checksums of weight tensors that add up: the checksums of a tensor's pieces sum to the checksum of the whole tensor.

    checksum(W) = sum_ij r(i) c(j) bits(W_ij)  mod 2^64

``bits`` is the element's bit pattern as an integer; r(i) and c(j) are odd 64-bit numbers, a fixed hash of the element's
row and column in the whole tensor. A piece may be a tensor-parallel shard or a slice of a fused matrix. Sums modulo
2^64 are exact, so neither the cuts through a tensor, nor the order of summation, nor the device change the result.

An odd factor is invertible modulo 2^64, so a change of one element always changes the checksum. Several changes cancel
only if their weighted sum is a multiple of 2^64; for swapped rows or elements and for flipped signs the probability of
that is below 2^-30. The checksum guards against mistakes, not against an adversary.
"""

import torch
from torch import Tensor

from megatron_camopd.counter_random import mix

_BLOCK = 1 << 21  # elements taken at once: a checksum needs memory for two int64 copies of a block
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW_SALT, _COLUMN_SALT = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def checksum(tensor: Tensor, *, dtype: torch.dtype | None = None, row: int = 0, column: int = 0) -> Tensor:
    """Return the checksum of a whole tensor or of a piece of it, without waiting for the device.

    Args:
        tensor: [R] or [R, C] with any strides; 1, 2, 4 or 8 bytes an element.
        dtype: Take the bits that ``tensor.to(dtype)`` would have; default: the tensor's own bits.
        row: Row of the piece's first element in the whole tensor.
        column: Column of the piece's first element in the whole tensor.

    Returns:
        Scalar int64 on the tensor's device.
    """
    matrix = tensor.detach()
    matrix = matrix[:, None] if matrix.dim() == 1 else matrix
    rows, columns = matrix.shape
    row_factors = _factors(row, rows, _ROW_SALT, matrix.device)
    column_factors = _factors(column, columns, _COLUMN_SALT, matrix.device)
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        block = matrix[start : start + step].to(dtype or matrix.dtype)
        bits = block.view(_INTEGERS[block.element_size()]).to(torch.int64)
        total += ((bits * column_factors).sum(1) * row_factors[start : start + step]).sum()
    return total


def _factors(first: int, count: int, salt: int, device: torch.device) -> Tensor:
    """Return the odd int64 factors [count] of the rows or columns ``first``, ``first`` + 1, ..."""
    return mix(torch.arange(first, first + count, dtype=torch.int64, device=device) + salt) | 1
