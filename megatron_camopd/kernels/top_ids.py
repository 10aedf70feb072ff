"""Ids of the largest logits of a row, over tiles and shards of the vocabulary.

Every logit gets an integer key that sorts by logit, and among equal logits by id, the smaller id being the larger key.
All keys differ, so every layout and device finds the same ids, whereas ``torch.topk`` may return any of equal logits.
"""

import torch
from torch import Tensor

from megatron_camopd.kernels.rows_torch import row_groups

_NONE = torch.iinfo(torch.int64).min  # smaller than any key; fills up a shard with too few columns
_LOW = 0xFFFFFFFF


def largest(logits: Tensor, first: int, count: int) -> Tensor:
    """Return the largest keys of each row of ``logits`` [C, V] fp32, whose column 0 is the id ``first``.

    Returns:
        [C, min(count, V)] int64, descending.
    """
    ids = _LOW - torch.arange(first, first + logits.shape[1], device=logits.device)
    best = []
    for rows in row_groups(logits):  # a few rows at a time, as keys take twice the bytes of the logits
        bits = (logits[rows] + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        keys = (ordered << 32) | ids
        best.append(keys.topk(min(count, keys.shape[1]), dim=1).values)
    return torch.cat(best)


def largest_keys(candidates: list[Tensor], rows: int, count: int, device: torch.device) -> Tensor:
    """Return the largest keys [rows, count] among ``candidates``, filled up with a minimal key if they are too few."""
    filler = torch.full((rows, count), _NONE, dtype=torch.int64, device=device)
    return torch.cat([*candidates, filler], dim=1).topk(count, dim=1).values


def merge(keys: Tensor) -> Tensor:
    """Merge the keys [P, C, count] of P parts of the rows into ids [C, count] int64, the largest logit's first."""
    parts, rows, count = keys.shape
    best = keys.transpose(0, 1).reshape(rows, parts * count).topk(count, dim=1).values
    return _LOW - (best & _LOW)
