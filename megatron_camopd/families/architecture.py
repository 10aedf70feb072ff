"""Architecture of a model: the sizes that converters, trainer and rollout engine need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

VOCABULARY_MULTIPLE = 128
"""Multiple to which vocabulary rows are padded, so that every tensor-parallel size 2^k <= 128 divides them."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder, as config.json states them; a family may add fields in a subclass.

    ``tied`` means that the output matrix is the embedding. ``dtype`` is None if config.json names none. ``num_experts``
    is the number of experts of a layer that has experts, and ``experts_per_token`` how many of them a token uses; both
    are 0 in a dense model.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    tied: bool
    dtype: torch.dtype | None
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def layers_differ(self) -> bool:
        """Whether Megatron keeps each layer under keys of its own, because the layers are of several kinds."""
        return False

    @property
    def padded_vocab_size(self) -> int:
        """Rows V' of a checkpoint's embedding: ``vocab_size`` rounded up to :data:`VOCABULARY_MULTIPLE`."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
