"""Orders of rows: Q, K and V interleaved by query group, and the padding of the vocabulary."""

from __future__ import annotations

import torch

from megatron_camopd.families.architecture import Architecture


def fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: Architecture) -> torch.Tensor:
    """Interleave ``q`` [g r d, H], ``k`` [g d, H] and ``v`` [g d, H] by query group: [g (r + 2) d, H].

    Biases have no axis H. The letters are those of :mod:`~megatron_camopd.families.table`.
    """
    groups = k.shape[0] // arch.head_dim
    parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: torch.Tensor, arch: Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split ``qkv`` into q, k and v, the inverse of :func:`fuse_qkv`; it may hold any number of whole query groups.

    Raises:
        ValueError: ``qkv`` does not hold whole query groups.
    """
    query_rows = arch.num_heads // arch.num_query_groups * arch.head_dim
    group_rows = query_rows + 2 * arch.head_dim
    if qkv.shape[0] % group_rows:
        raise ValueError(f"linear_qkv of {qkv.shape[0]} rows holds no whole query groups of {group_rows} rows")
    grouped = qkv.reshape(-1, group_rows, *qkv.shape[1:])
    q, k, v = grouped.split((query_rows, arch.head_dim, arch.head_dim), dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zero rows, the padding of the vocabulary, to ``tensor`` [R, ...] until it has ``rows`` >= R rows."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])))
