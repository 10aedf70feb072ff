"""Megatron's local layers, for machines without Transformer Engine, with norms that support sequence parallelism."""

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_camopd.families.rms_norm import RMSNorm


def plain_layers(
    config: TransformerConfig, vp_stage: int | None = None, *, qk_layernorm: bool
) -> TransformerBlockSubmodules:
    """Return the specification of this pipeline stage's layers, with :class:`RMSNorm` as every norm.

    Args:
        config: Megatron's configuration of the model.
        vp_stage: The virtual pipeline stage, None without interleaving.
        qk_layernorm: Whether queries and keys are normalised head by head.
    """
    layer = _layer(qk_layernorm=qk_layernorm)
    layers_here = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=RMSNorm)


def layers_with_experts(
    config: TransformerConfig, vp_stage: int | None = None, *, qk_layernorm: bool
) -> TransformerBlockSubmodules:
    """Return the specification of this pipeline stage's layers, all of them with experts, or some dense.

    Args:
        config: Megatron's configuration of the model; its ``moe_layer_freq`` is 1, or a list with a 1 for each layer
            that has experts and a 0 for each dense one.
        vp_stage: The virtual pipeline stage, None without interleaving.
        qk_layernorm: Whether queries and keys are normalised head by head.
    """
    pattern = config.moe_layer_freq
    pattern = [1] * config.num_layers if pattern == 1 else pattern
    assert isinstance(pattern, list) and len(pattern) == config.num_layers, pattern
    dense = _layer(qk_layernorm=qk_layernorm)
    experts = _layer(qk_layernorm=qk_layernorm, experts=config.num_moe_experts)
    # Here the norm is a module of its own with Transformer Engine, too: its key in a checkpoint is its own name.
    experts.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    first = get_transformer_layer_offset(config, vp_stage)
    here = pattern[first : first + get_num_layers_to_build(config, vp_stage)]
    return TransformerBlockSubmodules(
        layer_specs=[experts if has_experts else dense for has_experts in here], layer_norm=RMSNorm
    )


def _layer(*, qk_layernorm: bool, experts: int | None = None) -> ModuleSpec:
    """Return the specification of one layer, dense or with a number of ``experts``."""
    layer: ModuleSpec = copy.deepcopy(
        get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm", num_experts=experts)
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return layer
