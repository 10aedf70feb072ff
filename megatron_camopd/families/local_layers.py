"""Megatron's local layers, for machines without Transformer Engine, with norms that support sequence parallelism."""

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

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
    layer: ModuleSpec = copy.deepcopy(get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm"))
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    layers_here = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=RMSNorm)
