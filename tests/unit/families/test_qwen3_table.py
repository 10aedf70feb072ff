"""The Qwen3 table: names, shapes, row orders and tensor-parallel cuts, against references written out by hand."""

import pytest
import torch

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.qwen3 import FAMILY
from megatron_camopd.families.registry import family_of
from megatron_camopd.families.table import Partition, TensorEntry

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 74,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TABLE = FAMILY.table
ARCH = FAMILY.read_architecture(CONFIG)
BY_KEY = TABLE.by_key
QKV = BY_KEY["decoder.layers.self_attention.linear_qkv.weight"]
FC1 = BY_KEY["decoder.layers.mlp.linear_fc1.weight"]
EMBEDDING = BY_KEY["embedding.word_embeddings.weight"]


def numbered(*shape: int) -> torch.Tensor:
    """A tensor whose values are all different."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def parts_of(entry: TensorEntry) -> list[torch.Tensor]:
    return [numbered(*shape) + 10_000 * i for i, shape in enumerate(entry.hf_shapes(ARCH))]


def test_hugging_face_names_and_shapes() -> None:
    layer = {
        "input_layernorm": (20,),
        "self_attn.q_proj": (48, 20),
        "self_attn.k_proj": (24, 20),
        "self_attn.v_proj": (24, 20),
        "self_attn.q_norm": (6,),
        "self_attn.k_norm": (6,),
        "self_attn.o_proj": (20, 48),
        "post_attention_layernorm": (20,),
        "mlp.gate_proj": (24, 20),
        "mlp.up_proj": (24, 20),
        "mlp.down_proj": (20, 24),
    }
    expected = {"model.embed_tokens.weight": (74, 20), "model.norm.weight": (20,), "lm_head.weight": (74, 20)}
    expected |= {f"model.layers.{i}.{name}.weight": shape for i in range(3) for name, shape in layer.items()}
    assert TABLE.hf_shapes(ARCH) == expected
    tied = FAMILY.read_architecture(CONFIG | {"tie_word_embeddings": True})
    assert expected.keys() - TABLE.hf_shapes(tied).keys() == {"lm_head.weight"}


def test_checkpoint_shapes() -> None:
    prefix = "decoder.layers."
    assert {entry.key: entry.checkpoint_shape(ARCH) for entry in TABLE.entries} == {
        "embedding.word_embeddings.weight": (128, 20),
        prefix + "self_attention.linear_qkv.layer_norm_weight": (3, 20),
        prefix + "self_attention.linear_qkv.weight": (3, 96, 20),
        prefix + "self_attention.q_layernorm.weight": (3, 6),
        prefix + "self_attention.k_layernorm.weight": (3, 6),
        prefix + "self_attention.linear_proj.weight": (3, 20, 48),
        prefix + "mlp.linear_fc1.layer_norm_weight": (3, 20),
        prefix + "mlp.linear_fc1.weight": (3, 48, 20),
        prefix + "mlp.linear_fc2.weight": (3, 20, 24),
        "decoder.final_layernorm.weight": (20,),
        "output_layer.weight": (128, 20),
    }


@pytest.mark.parametrize("name", ["self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"])
def test_both_spellings_of_the_attention_norm(name: str) -> None:
    entry, index = TABLE.find_module_parameter(f"module.module.decoder.layers.12.{name}")
    assert (entry.hf_names(index), index) == (("model.layers.12.input_layernorm.weight",), (12,))


@pytest.mark.parametrize("name", ["mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"])
def test_both_spellings_of_the_mlp_norm(name: str) -> None:
    entry, index = TABLE.find_module_parameter(f"decoder.layers.0.{name}")
    assert entry.hf_names(index) == ("model.layers.0.post_attention_layernorm.weight",)


def test_module_names_outside_the_layers() -> None:
    for name, hf in [
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ]:
        entry, index = TABLE.find_module_parameter(name)
        assert (entry.hf_names(index), index) == ((hf,), ())
    for stranger in ("decoder.layers.0.mlp.router.weight", "decoder.layers.self_attention.linear_proj.weight"):
        with pytest.raises(KeyError, match="router" if "router" in stranger else "linear_proj"):
            TABLE.find_module_parameter(stranger)


def test_qkv_rows_are_interleaved_by_query_group() -> None:
    q, k, v = parts_of(QKV)
    rows = []
    for group in range(4):  # two query heads of 6 rows each per group, then one key and one value head
        rows += [q[12 * group + i] for i in range(12)]
        rows += [k[6 * group + i] for i in range(6)] + [v[6 * group + i] for i in range(6)]
    assert torch.equal(QKV.to_megatron((q, k, v), ARCH), torch.stack(rows))


def test_gate_precedes_up() -> None:
    gate, up = parts_of(FC1)
    assert torch.equal(FC1.to_megatron((gate, up), ARCH)[:24], gate)
    assert torch.equal(FC1.to_megatron((gate, up), ARCH)[24:], up)


def test_vocabulary_is_padded_with_zeros_and_cut() -> None:
    (embedding,) = parts_of(EMBEDDING)
    padded = EMBEDDING.to_megatron((embedding,), ARCH)
    assert padded.shape == (128, 20) and torch.equal(padded[:74], embedding) and not padded[74:].any()
    assert torch.equal(EMBEDDING.to_hf(torch.cat((padded, padded)), ARCH)[0], embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", TABLE.entries, ids=lambda entry: entry.key)
def test_every_entry_undoes_itself(entry: TensorEntry, dtype: torch.dtype) -> None:
    parts = [torch.randn(shape).to(dtype) for shape in entry.hf_shapes(ARCH)]
    fused = entry.to_megatron(parts, ARCH)
    assert fused.shape == entry.shape(ARCH)
    back = entry.to_hf(fused, ARCH)
    assert len(back) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("entry", TABLE.entries, ids=lambda entry: entry.key)
def test_tensor_parallel_shards_join_again(entry: TensorEntry, tp_size: int) -> None:
    full = entry.to_megatron(parts_of(entry), ARCH)
    shards = [entry.tp_shard(full, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    expected = list(full.shape)
    if entry.partition.dim is not None:
        expected[entry.partition.dim] //= tp_size
    assert all(list(shard.shape) == expected for shard in shards)
    assert torch.equal(entry.tp_join(shards), full)


def test_shards_hold_their_own_heads_and_feed_forward_rows() -> None:
    q, k, v = parts_of(QKV)
    shard = QKV.tp_shard(QKV.to_megatron((q, k, v), ARCH), tp_rank=1, tp_size=2)
    for part, whole in zip(QKV.to_hf(shard, ARCH), (q, k, v), strict=True):
        assert torch.equal(part, whole[whole.shape[0] // 2 :])
    gate, up = parts_of(FC1)
    shard = FC1.tp_shard(FC1.to_megatron((gate, up), ARCH), tp_rank=1, tp_size=4)
    assert torch.equal(shard, torch.cat((gate[6:12], up[6:12])))
    row = BY_KEY["decoder.layers.mlp.linear_fc2.weight"]
    (down,) = parts_of(row)
    assert row.partition is Partition.ROW
    assert torch.equal(row.tp_shard(down, tp_rank=3, tp_size=4), down[:, 18:24])


def test_indivisible_tensor_parallel_size_is_refused() -> None:
    full = FC1.to_megatron(parts_of(FC1), ARCH)
    with pytest.raises(ConfigurationError, match=r"--tensor-model-parallel-size 16: .*linear_fc1.* divisor of 24"):
        FC1.tp_shard(full, tp_rank=0, tp_size=16)


def arguments(**changes: object) -> dict[str, object]:
    return FAMILY.megatron_arguments(FAMILY.read_architecture(CONFIG | changes))


def test_architecture_args() -> None:
    args = arguments()
    assert args == args | {
        "num_layers": 3,
        "hidden_size": 20,
        "ffn_hidden_size": 24,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 6,
        "max_position_embeddings": 256,
        "position_embedding_type": "rope",
        "rotary_base": 1000000,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": True,
        "vocab_size": 74,
        "padded_vocab_size": 128,
        "make_vocab_size_divisible_by": 128,
    }
    assert isinstance(args["rotary_base"], int)
    assert arguments(rope_theta=1234.5)["rotary_base"] == 1234.5
    assert arguments(vocab_size=151936)["padded_vocab_size"] == 151936
    assert not arguments(tie_word_embeddings=True)["untie_embeddings_and_output_weights"]


def test_config_of_transformers_5() -> None:
    new = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "dtype": "float32"}
    arch = FAMILY.read_architecture(new)
    assert (arch.rope_theta, arch.dtype) == (500000.0, torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; expected 'qwen3' (dense Qwen3)"),
        ({"model_type": "qwen3_moe_x"}, "model_type is 'qwen3_moe_x'; expected 'qwen3'"),
        ({"model_type": None}, "model_type is None; expected 'qwen3'"),
        ({"model_type": ["qwen3"]}, "model_type is ['qwen3']; expected 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; expected false"),
        ({"use_sliding_window": True}, "use_sliding_window is True; expected false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2.0}}, "rope_parameters"),
        ({"rope_theta": None}, "rope_theta is None; expected a positive number"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected 'bfloat16' or 'float32'"),
        ({"head_dim": None}, "head_dim is None; expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a positive integer"),
        (
            {"num_hidden_layers": 10**18},
            "num_hidden_layers is 1000000000000000000; expected a positive integer, at most",
        ),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001; expected at most 10,000"),
        ({"num_hidden_layers": 28.0}, "num_hidden_layers is 28.0; expected a positive integer"),
        ({"hidden_size": True}, "hidden_size is True; expected a positive integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a positive number below 1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; expected a positive number below 1"),
        ({"rms_norm_eps": 2}, "rms_norm_eps is 2; expected a positive number below 1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        (
            {"rope_parameters": {"rope_type": ["default"]}},
            "rope_parameters is {'rope_type': ['default']}; expected plain",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; expected false"),
        ({"dtype": {"": "float32"}}, "dtype is {'': 'float32'}; expected 'bfloat16' or 'float32'"),
        ({"dtype": ["float32"]}, "dtype is ['float32']; expected 'bfloat16' or 'float32'"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected only 'full_attention'"),
        ({"layer_types": [["full_attention"], 3]}, "layer_types is ['3', "),
        ({"layer_types": 3}, "layer_types is 3; expected only 'full_attention'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads 8"),
    ],
)
def test_unsupported_configs_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        config = CONFIG | change
        family_of(config, source="/models/x/config.json").read_architecture(config, source="/models/x/config.json")
    message = str(raised.value)
    assert words in message and message.startswith("/models/x/config.json: ") and "\n" not in message


def test_null_is_absent() -> None:
    nulls = {"tie_word_embeddings": None, "rope_scaling": None, "rope_parameters": {"rope_theta": None}}
    found = FAMILY.read_architecture(CONFIG | nulls)
    assert found == FAMILY.read_architecture({key: value for key, value in CONFIG.items() if key not in nulls})


def test_plain_rope_scaling_and_unused_windows_are_accepted() -> None:
    harmless = {"rope_scaling": {"rope_type": "default"}, "sliding_window": 4096, "use_sliding_window": False}
    assert FAMILY.read_architecture(CONFIG | harmless | {"layer_types": ["full_attention"] * 3}) == ARCH
