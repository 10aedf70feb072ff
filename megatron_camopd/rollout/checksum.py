"""Checksums of weights that can be taken piece by piece: of a shard, of a slice of a fused matrix, of the whole tensor.

    checksum(W) = sum_ij r(i) c(j) bits(W_ij)  mod 2^64

with ``bits`` the element's bit pattern as an integer and r, c odd 64-bit numbers drawn from the global row and column
by a fixed hash. Sums modulo 2^64 are exact, so neither blocks, nor the order of summation, nor the device matter, and
the checksums of disjoint pieces add up to that of the whole. An odd factor is invertible: a change of one element is
always seen. Several changes go unseen only if their weighted sum is a multiple of 2^64, for rows or elements that were
swapped, or signs that were flipped, less likely than 2^-30. It guards against mistakes, not against an adversary.
"""

import torch
from torch import Tensor

from megatron_camopd.counter_random import mix

_BLOCK = 1 << 21  # elements; two int64 copies of a block are what a checksum needs beside the tensor
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW_SALT, _COLUMN_SALT = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def checksum(tensor: Tensor, *, dtype: torch.dtype | None = None, row: int = 0, column: int = 0) -> Tensor:
    """The checksum (int64 scalar on the tensor's device) of ``tensor`` [R] or [R, C], of any strides.

    ``row`` and ``column``: where its first element lies in the tensor it is a piece of. ``dtype``: take the bits that
    ``tensor.to(dtype)`` would have. Depends on the dtype only through the bits. Nothing waits for the device.
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
    """Return odd int64 numbers [count] for the places ``first``, ``first`` + 1, ..."""
    return mix(torch.arange(first, first + count, dtype=torch.int64, device=device) + salt) | 1
