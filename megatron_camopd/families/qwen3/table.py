"""Table of the tensors of a dense Qwen3."""

from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.table import (
    EMBEDDING_KEY,
    OUTPUT_KEY,
    Partition,
    Shape,
    TensorTable,
    layer_entry,
    model_entry,
)


def _hidden(arch: Architecture) -> tuple[Shape, ...]:
    return ((arch.hidden_size,),)


def _head(arch: Architecture) -> tuple[Shape, ...]:
    return ((arch.head_dim,),)


def _vocabulary(arch: Architecture) -> Shape:
    return arch.vocab_size, arch.hidden_size


def _qkv(arch: Architecture) -> tuple[Shape, ...]:
    heads = (arch.num_heads, arch.num_query_groups, arch.num_query_groups)
    return tuple((count * arch.head_dim, arch.hidden_size) for count in heads)


TABLE = TensorTable([
    model_entry(EMBEDDING_KEY, "model.embed_tokens.weight", Partition.VOCAB, _vocabulary),
    layer_entry(
        "self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], Partition.REPLICATED, _hidden,
        local="input_layernorm.weight",
    ),
    layer_entry(
        "self_attention.linear_qkv.weight",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"], Partition.QKV, _qkv,
    ),
    layer_entry("self_attention.q_layernorm.weight", ["self_attn.q_norm.weight"], Partition.REPLICATED, _head),
    layer_entry("self_attention.k_layernorm.weight", ["self_attn.k_norm.weight"], Partition.REPLICATED, _head),
    layer_entry(
        "self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], Partition.ROW,
        lambda arch: ((arch.hidden_size, arch.num_heads * arch.head_dim),),
    ),
    layer_entry(
        "mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], Partition.REPLICATED, _hidden,
        local="pre_mlp_layernorm.weight",
    ),
    layer_entry(
        "mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], Partition.GATE_UP,
        lambda arch: ((arch.ffn_hidden_size, arch.hidden_size),) * 2,
    ),
    layer_entry(
        "mlp.linear_fc2.weight", ["mlp.down_proj.weight"], Partition.ROW,
        lambda arch: ((arch.hidden_size, arch.ffn_hidden_size),),
    ),
    model_entry(
        "decoder.final_layernorm.weight", "model.norm.weight", Partition.REPLICATED, lambda arch: (arch.hidden_size,)
    ),
    model_entry(OUTPUT_KEY, "lm_head.weight", Partition.VOCAB, _vocabulary),
])  # fmt: skip
