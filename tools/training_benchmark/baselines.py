"""Baselines of packed micro-batches: rows padded to the longest, and packed rows under a mask.

Both are what the trainer did before it packed sequences by a token budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_camopd.model.microbatch import Microbatch, Piece
from megatron_camopd.model.passes import PassSettings


@dataclass(frozen=True)
class PaddedSettings(PassSettings):
    """Settings of passes whose micro-batches are ``rows`` sequences of similar lengths, padded to the longest."""

    rows: int = 1

    def microbatches(self, pieces: Sequence[Piece]) -> list[Microbatch]:
        """Make micro-batches [b, S] with one sequence a row, longest first; attention is the same, without packing."""
        order = sorted(pieces, key=lambda piece: -len(piece.token_ids))
        return [_padded(order[start : start + self.rows]) for start in range(0, len(order), self.rows)]


def _padded(group: Sequence[Piece]) -> Microbatch:
    width = len(group[0].token_ids)
    tokens = torch.zeros(len(group), width, dtype=torch.int64)
    for place, piece in enumerate(group):
        tokens[place, : len(piece.token_ids)] = piece.token_ids
    wanted = torch.cat([place * width + piece.places for place, piece in enumerate(group)])
    packed: Any = None
    return Microbatch(
        tokens=tokens,
        position_ids=torch.arange(width).expand_as(tokens),
        positions=wanted - 1,
        targets=tokens.flatten()[wanted],
        rows=torch.cat([torch.full_like(piece.places, piece.row) for piece in group]),
        columns=torch.cat([piece.columns for piece in group]),
        packed=packed,
        padded_tokens=tokens.numel(),
    )


class MaskedAttention(DotProductAttention):
    """Megatron's local attention over a whole packed row, with a mask that keeps its sequences apart."""

    mask: Tensor
    """[1, 1, S, S] bool, True where attention is forbidden"""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
        """Attend within the row; query, key and value are [S, heads, D], the result is [S, 1, heads D]."""
        return super().forward(query[:, None], key[:, None], value[:, None], self.mask, options.get("attn_mask_type"))


def mask_of(lengths: Sequence[int]) -> Tensor:
    """Return the mask of a row that holds sequences of these lengths, [1, 1, S, S] bool, True where forbidden."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return ~((owner[:, None] == owner[None, :]) & causal)[None, None]
