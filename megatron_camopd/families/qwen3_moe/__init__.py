"""Qwen3 with a mixture of experts, as a :class:`~megatron_camopd.families.family.Family`.

Every layer has experts, or some layers are dense (``mlp_only_layers``, ``decoder_sparse_step`` in config.json). A
router picks ``num_experts_per_tok`` experts for each token; there are no shared experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_camopd.families import qwen3
from megatron_camopd.families.family import Family
from megatron_camopd.families.placement import ModuleState
from megatron_camopd.families.qwen3_moe.arguments import FIXED, FOREIGN, megatron_arguments
from megatron_camopd.families.qwen3_moe.config import dense_layers, expert_layers, read_architecture
from megatron_camopd.families.qwen3_moe.table import TABLE

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def _local_layers(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    # Imported here, so that converters start without Megatron.
    from megatron_camopd.families.qwen3_moe.layers import local_layers

    return local_layers(config, vp_stage)


_LINEAR = ("linear_fc1", "linear_fc2")

FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3 with experts",
    hf_class="Qwen3MoeForCausalLM",
    table=TABLE,
    read_architecture=read_architecture,
    megatron_arguments=megatron_arguments,
    local_layers=_local_layers,
    extra_state_modules=tuple(
        module for module in qwen3.FAMILY.extra_state_modules if module.startswith("self_attention.")
    ),
    partial_state_modules=(
        *(ModuleState(module=f"mlp.{name}", layers=dense_layers) for name in _LINEAR),
        ModuleState(module="pre_mlp_layernorm", layers=expert_layers),
        *(ModuleState(module=f"mlp.experts.experts.{name}", layers=expert_layers, per_expert=True) for name in _LINEAR),
    ),
    fixed_arguments=FIXED,
    foreign_arguments=FOREIGN,
)
