"""The ids of a row's largest logits, over tiles and shards of the vocabulary.

Every logit gets an integer key whose order is that of (logit, then the smaller id): a total order, hence the same ids
on every layout and device, also among equal logits, where ``torch.topk`` takes any.
"""

import torch
from torch import Tensor

from megatron_camopd.kernels.rows_torch import row_groups

_NONE = torch.iinfo(torch.int64).min  # in place of a column that a short shard lacks
_LOW = 0xFFFFFFFF


def largest(logits: Tensor, first: int, count: int) -> Tensor:
    """Keys [C, min(count, V)] int64, descending, of ``logits`` [C, V] fp32 whose column 0 is the id ``first``."""
    ids = _LOW - torch.arange(first, first + logits.shape[1], device=logits.device)
    best = []
    for rows in row_groups(logits):  # keys take twice the bytes of the logits: for a few rows at a time
        bits = (logits[rows] + 0.0).view(torch.int32).long()  # + 0.0: -0.0 is 0.0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        keys = (ordered << 32) | ids
        best.append(keys.topk(min(count, keys.shape[1]), dim=1).values)
    return torch.cat(best)


def largest_keys(candidates: list[Tensor], rows: int, count: int, device: torch.device) -> Tensor:
    """The largest [rows, count] of the keys in ``candidates``; where they are too few, keys that lose to all."""
    filler = torch.full((rows, count), _NONE, dtype=torch.int64, device=device)
    return torch.cat([*candidates, filler], dim=1).topk(count, dim=1).values


def merge(keys: Tensor) -> Tensor:
    """Keys [P, C, count] of P parts of the vocabulary -> ids [C, count] int64, the largest logit first."""
    parts, rows, count = keys.shape
    best = keys.transpose(0, 1).reshape(rows, parts * count).topk(count, dim=1).values
    return _LOW - (best & _LOW)
