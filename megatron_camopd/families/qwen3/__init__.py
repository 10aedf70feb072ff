"""Dense Qwen3, as a :class:`~megatron_camopd.families.family.Family`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_camopd.families.family import Family
from megatron_camopd.families.qwen3.config import megatron_arguments, read_architecture
from megatron_camopd.families.qwen3.table import TABLE

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def _local_layers(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    # Imported here, so that converters start without Megatron.
    from megatron_camopd.families.qwen3.layers import local_layers

    return local_layers(config, vp_stage)


FAMILY = Family(
    model_type="qwen3",
    title="dense Qwen3",
    hf_class="Qwen3ForCausalLM",
    table=TABLE,
    read_architecture=read_architecture,
    megatron_arguments=megatron_arguments,
    local_layers=_local_layers,
    extra_state_modules=(
        "self_attention.linear_qkv",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "self_attention.core_attention",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ),
)
