"""Megatron's local layers of a dense Qwen3: norms before attention and feed-forward, and of queries and keys."""

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_camopd.families.local_layers import plain_layers


def local_layers(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the specification of this pipeline stage's layers."""
    return plain_layers(config, vp_stage, qk_layernorm=True)
