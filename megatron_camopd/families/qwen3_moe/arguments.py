"""Megatron's arguments for a Qwen3 with experts."""

import re
from typing import Any

from megatron_camopd.families.model_arguments import PLAIN_DECODER, decoder_arguments
from megatron_camopd.families.qwen3_moe.config import Qwen3MoeArchitecture, expert_layers

FIXED: dict[str, Any] = PLAIN_DECODER | {
    "moe_latent_size": None, "moe_router_enable_expert_bias": False, "moe_router_num_groups": None,
    "moe_router_group_topk": None, "moe_router_topk_scaling_factor": None, "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None, "moe_router_quantile_balancing_ema": 0.0, "moe_input_jitter_eps": None,
    "moe_z_loss_coeff": None, "moe_expert_capacity_factor": None, "moe_expert_rank_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False, "moe_apply_probs_on_input": False,
    "moe_mlp_glu_interleave_size": None,
}  # fmt: skip
"""Values that these arguments have in a Qwen3 with experts; with others Megatron would compute another model."""

FOREIGN = re.compile(
    r"(mtp|mup|mamba|dsa_indexer|linear|relative_attention|yarn)_.+"
    r"|moe_(shared_expert_.+|token_drop_policy|router_bias_update_rate|use_upcycling|upcycling_.+)"
)
"""Pattern of the names of arguments that matter only in models of other kinds."""


def megatron_arguments(arch: Qwen3MoeArchitecture) -> dict[str, Any]:
    """Return Megatron's arguments, by ``args`` attribute name, for a Qwen3 with experts of ``arch``.

    The router takes the softmax of the logits of all experts and then the largest ones (``pre_softmax``), or the other
    way round, which is the same as scaling the largest probabilities so that they add up to 1. It computes in float32.
    No loss balances the load of the experts. ``moe_layer_freq`` is a list only where layers differ, because with any
    list Megatron gives every layer keys of its own.
    """
    experts = set(expert_layers(arch))
    pattern = [int(layer in experts) for layer in range(arch.num_layers)]
    return decoder_arguments(arch, qk_layernorm=True, add_qkv_bias=False) | {
        "num_experts": arch.num_experts,
        "moe_layer_freq": pattern if arch.layers_differ else 1,
        "moe_ffn_hidden_size": arch.expert_ffn_hidden_size,
        "moe_router_topk": arch.experts_per_token,
        "moe_router_pre_softmax": not arch.normalize_top_probabilities,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    }
