"""Megatron's local layers of a Qwen3 with experts."""

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_camopd.families.local_layers import layers_with_experts


def local_layers(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the specification of this pipeline stage's layers."""
    return layers_with_experts(config, vp_stage, qk_layernorm=True)
