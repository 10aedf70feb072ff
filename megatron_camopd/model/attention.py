"""Attention of Megatron's local layers, for packed sequences and context parallelism; in plain torch.

Megatron's own local attention takes neither. Transformer Engine's does: it is given the same ``PackedSeqParams``, so
both kinds of layers share all other code. Each sequence of a micro-batch is one call of torch's scaled dot product
attention. Its memory does not grow with the square of the length, but under context parallelism on a CPU, where torch
makes a mask of each chunk.

Under context parallelism every sequence is cut into 2 c chunks of equal length, for c ranks, and rank r holds the
chunks r and 2 c - 1 - r, one from the front and one from the back, so that all ranks compute about as much ("zig-zag").
Keys and values are gathered from all ranks of the group; their gradients are summed and scattered back.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, with what is needed on the host in every layer.

    Attributes:
        lengths: Tokens of each sequence, padding included, on all context-parallel ranks together.
        order: Result of :func:`in_order`, [T] int64 on the accelerator; without context parallelism 0 to T - 1.
    """

    lengths: tuple[int, ...] = ()
    order: Tensor | None = None


class PlainAttention(MegatronModule):
    """Causal attention with grouped queries, in place of Megatron's ``DotProductAttention``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        """Take the sizes from Megatron's configuration; the parameters are those that Megatron passes to any attention.

        The attention has no parameters, and ``layer_number``, ``attention_type`` and ``cp_comm_type`` do not matter.
        """
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        assert config.window_size is None and config.softmax_type == "vanilla", "families have neither"
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 0)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Attend, every token to those of its own sequence up to itself.

        Args:
            query: [T, heads, D] packed, where T counts this context-parallel rank's tokens, or [S, B, heads, D].
            key: the same with the number of key-value heads; without packing it may be longer than ``query``, which
                then has a single token, the last one.
            value: as ``key``.
            attention_mask: None.
            attn_mask_type: Does not matter.
            attention_bias: None.
            packed_seq_params: Where each sequence ends among the tokens of all context-parallel ranks; None without
                packing, which knows no context parallelism.

        Returns:
            [T, heads, D] or [S, B, heads D].
        """
        assert attention_mask is None and attention_bias is None, "sequences are packed, not masked"
        if packed_seq_params is None:
            assert query.shape[0] in (1, key.shape[0]), (query.shape, key.shape)
            one, two, three = (part.permute(1, 2, 0, 3) for part in (query, key, value))
            attended = self._attend(one, two, three, is_causal=query.shape[0] > 1)
            return attended.permute(2, 0, 1, 3).flatten(2)
        if self.context_group.size() > 1:
            return self._across_ranks(query, key, value, packed_seq_params)
        parts = zip(*(tensor.split(packed_seq_params.lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._sequence(*part, is_causal=True) for part in parts])

    def _across_ranks(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Attend from this rank's chunks of each sequence to the keys and values of all ranks."""
        ranks, rank, lengths = self.context_group.size(), self.context_group.rank(), packed.lengths
        assert packed.order is not None
        key, value = (self._gathered(tensor).index_select(0, packed.order) for tensor in (key, value))
        results = []
        queries = query.split([length // (2 * ranks) for length in lengths for _ in range(2)])
        for number, (keys, values) in enumerate(zip(key.split(lengths), value.split(lengths), strict=True)):
            chunk = lengths[number] // (2 * ranks)
            for place, own in zip((rank, 2 * ranks - 1 - rank), queries[2 * number : 2 * number + 2], strict=True):
                end = (place + 1) * chunk
                results.append(self._sequence(own, keys[:end], values[:end], attn_mask=causal_lower_right(chunk, end)))
        return torch.cat(results)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Return the tokens of all context-parallel ranks in rank order; the backward pass sums and scatters."""
        gathered: Tensor = gather_from_sequence_parallel_region(
            tensor, tensor_parallel_output_grad=True, group=self.context_group
        )
        return gathered

    def _sequence(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attend within one sequence: [L, heads, D] from and to."""
        one, two, three = (part.transpose(0, 1)[None] for part in (query, key, value))
        return self._attend(one, two, three, **options)[0].transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attend: [B, heads, S, D] from and to."""
        dropout = self.dropout if self.training else 0.0
        # As Megatron: heads of tensor-parallel ranks drop differently, but for sequence-parallel ones' common state.
        separate = dropout and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if separate else contextlib.nullcontext():
            return scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, scale=self.scale, enable_gqa=True, **options
            )


def in_order(lengths: Sequence[int], ranks: int, held: int) -> Tensor:
    """Return where each token of packed sequences lies among the ranks' tokens in rank order: [T] int64.

    Args:
        lengths: Tokens of each sequence, multiples of 2 ``ranks``.
        ranks: Size of the context-parallel group.
        held: Tokens of one rank, T / ``ranks``.
    """
    places, start = [], 0
    for length in lengths:
        chunk = length // (2 * ranks)
        offsets = [rank * held + start for rank in range(ranks)]
        offsets += [rank * held + start + chunk for rank in reversed(range(ranks))]
        places += [torch.arange(offset, offset + chunk) for offset in offsets]
        start += 2 * chunk
    return torch.cat(places)
