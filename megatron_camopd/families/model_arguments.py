"""Megatron's arguments that decide what a model computes: their values in a plain decoder.

A plain decoder has RMSNorm before attention and feed-forward, rotary embeddings, grouped queries and SwiGLU. Its
arguments are of three kinds: those that :func:`decoder_arguments` states and every checkpoint carries,
:data:`PLAIN_DECODER`, which keep Megatron's defaults, and :data:`OTHER_KINDS`, which matter only in models of other
kinds. A family that differs (experts, scaled rope) moves arguments from the latter two to the first.
"""

import re
from typing import Any

from megatron_camopd.families.architecture import VOCABULARY_MULTIPLE, Architecture

RUN_ARGUMENTS = ("attention_dropout", "hidden_dropout", "padded_vocab_size", "tokenizer_type")
"""Arguments in a checkpoint that a run does not take from there, because they belong to the run, not to the model."""

PLAIN_DECODER: dict[str, Any] = {
    "window_size": None, "window_attn_skip_freq": None, "softmax_type": "vanilla", "no_rope_freq": None,
    "rope_type": "rope", "use_rope_scaling": False, "rope_scaling_factor": 8.0, "mrope_section": None,
    "rotary_seq_len_interpolation_factor": None, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0,
    "apply_query_key_layer_scaling": False, "apply_residual_connection_post_layernorm": False,
    "layernorm_zero_centered_gamma": False, "qk_l2_norm": False, "qk_clip": False, "attention_output_gate": False,
    "multi_latent_attention": False, "experimental_attention_variant": None, "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None, "openai_gelu": False, "quick_geglu": False, "onnx_safe": None,
    "use_mup": False, "is_hybrid_model": False, "hybrid_override_pattern": None,
    "heterogeneous_layers_config_path": None, "heterogeneous_layers_config_encoded_json": None,
}  # fmt: skip
"""Values that these arguments have in a plain decoder; with others Megatron would compute another model."""

OTHER_KINDS = re.compile(r"(moe|mtp|mup|mamba|dsa_indexer|linear|relative_attention|yarn)_.+")
"""Pattern of the names of arguments that matter only in models of other kinds: experts, Mamba, muP and so on."""


def decoder_arguments(arch: Architecture, *, qk_layernorm: bool, add_qkv_bias: bool) -> dict[str, Any]:
    """Return Megatron's arguments, by ``args`` attribute name, for a plain decoder of ``arch``.

    The importer writes them into the checkpoint. ``--use-checkpoint-args`` of Megatron-core 0.19 leaves out
    ``qk_layernorm``, ``layernorm_epsilon``, ``vocab_size`` and ``make_vocab_size_divisible_by``; the trainer
    sets those itself.
    """
    theta = arch.rope_theta
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_heads,
        "group_query_attention": True,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "max_position_embeddings": arch.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "qk_layernorm": qk_layernorm,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": add_qkv_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not arch.tied,
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": arch.padded_vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "tokenizer_type": "HuggingFaceTokenizer",
    }
