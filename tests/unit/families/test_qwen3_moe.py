"""The family of Qwen3 with experts: names, places in a checkpoint, arguments and refusals, against what is known.

The names with Transformer Engine's grouped layers come from Megatron's source; local layers are held against a real
model in ``tests/integration/test_convert_experts.py``.
"""

from typing import Any

import pytest
import torch

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.qwen3_moe import FAMILY
from megatron_camopd.families.registry import family_of
from megatron_camopd.families.table import Partition

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 20,
    "intermediate_size": 24,
    "moe_intermediate_size": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 74,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}
MIXED = CONFIG | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}  # experts in layer 3 alone
# As published for Qwen3-30B-A3B and Qwen3-235B-A22B.
PUBLISHED = {
    "30B": {"num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
            "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960},
    "235B": {"num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
             "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
             "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960},
}  # fmt: skip
TABLE = FAMILY.table
ARCH = FAMILY.read_architecture(CONFIG)
MIXED_ARCH = FAMILY.read_architecture(MIXED)


def read(**changes: Any) -> Any:
    return FAMILY.read_architecture(CONFIG | changes)


def expert_names(layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the feed-forward part of an expert layer."""
    prefix = f"model.layers.{layer}.mlp."
    found: dict[str, tuple[int, ...]] = {f"{prefix}gate.weight": (3, 20)}
    for expert in range(3):
        found |= {f"{prefix}experts.{expert}.{part}_proj.weight": (6, 20) for part in ("gate", "up")}
        found[f"{prefix}experts.{expert}.down_proj.weight"] = (20, 6)
    return found


def feed_forward(arch: Any, layer: int) -> dict[str, tuple[int, ...]]:
    shapes = TABLE.hf_shapes(arch)
    return {name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{layer}.mlp.")}


def test_hugging_face_names_of_expert_and_dense_layers() -> None:
    dense = {"gate_proj": (24, 20), "up_proj": (24, 20), "down_proj": (20, 24)}
    for layer in range(4):
        assert feed_forward(ARCH, layer) == expert_names(layer)
        expected = {f"model.layers.{layer}.mlp.{name}.weight": shape for name, shape in dense.items()}
        assert feed_forward(MIXED_ARCH, layer) == (expert_names(3) if layer == 3 else expected)
    for arch in (ARCH, MIXED_ARCH):
        names = list(TABLE.hf_shapes(arch))
        assert len([name for name in names if name.endswith("post_attention_layernorm.weight")]) == 4
        assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]


def places(arch: Any) -> dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Keys of layers with the (offsets, global shape) of what lies under them."""
    found: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for entry, index in TABLE.model_tensors(arch):
        key, offsets, _ = entry.place(index, arch)
        found.setdefault(key, set()).add((offsets, entry.checkpoint_shape(arch)))
    return found


def test_equal_layers_are_stacked_with_their_experts_behind_them() -> None:
    found = places(ARCH)
    assert found["decoder.layers.mlp.router.weight"] == {((layer,), (4, 3, 20)) for layer in range(4)}
    fc1 = {((layer, expert), (4, 3, 12, 20)) for layer in range(4) for expert in range(3)}
    assert found["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == fc1
    fc2 = {(index, (4, 3, 20, 6)) for index, _ in fc1}
    assert found["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == fc2
    assert found["decoder.layers.pre_mlp_layernorm.weight"] == {((layer,), (4, 20)) for layer in range(4)}
    assert not any("decoder.layers.mlp.linear" in key for key in found)


def test_layers_that_differ_have_keys_of_their_own() -> None:
    found = places(MIXED_ARCH)
    assert not any(key.startswith(("decoder.layers.mlp", "decoder.layers.self", "decoder.layers.pre")) for key in found)
    assert found["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"] == {((e,), (3, 12, 20)) for e in range(3)}
    assert found["decoder.layers.3.pre_mlp_layernorm.weight"] == {((), (20,))}
    for layer in range(3):
        assert found[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] == {((), (48, 20))}
        assert found[f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"] == {((), (20,))}
    assert found["decoder.layers.0.self_attention.linear_qkv.weight"] == {((), (96, 20))}
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" not in found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Transformer Engine's grouped layers, then local ones
        ("mlp.experts.linear_fc1.weight2", ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj")),
        ("mlp.experts.local_experts.2.linear_fc1.weight", ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj")),
        ("mlp.experts.linear_fc2.weight0", ("mlp.experts.0.down_proj",)),
        ("mlp.experts.local_experts.0.linear_fc2.weight", ("mlp.experts.0.down_proj",)),
        ("mlp.router.weight", ("mlp.gate",)),
        ("pre_mlp_layernorm.weight", ("post_attention_layernorm",)),
        ("input_layernorm.weight", ("input_layernorm",)),
        ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm",)),
    ],
)
def test_names_in_memory(name: str, expected: tuple[str, ...]) -> None:
    entry, index = TABLE.find_module_parameter(f"module.module.decoder.layers.1.{name}", ARCH, first_layer=2)
    assert index[0] == 3 and entry.hf_names(index) == tuple(f"model.layers.3.{part}.weight" for part in expected)


def test_a_norm_that_local_layers_call_the_same_belongs_to_the_kind_of_its_layer() -> None:
    for layer, key in ((2, "mlp.linear_fc1.layer_norm_weight"), (3, "pre_mlp_layernorm.weight")):
        name = "decoder.layers.1.pre_mlp_layernorm.weight"
        entry, index = TABLE.find_module_parameter(name, MIXED_ARCH, first_layer=layer - 1)
        assert (entry.key, index) == (f"decoder.layers.{key}", (layer,))
        assert entry.hf_names(index) == (f"model.layers.{layer}.post_attention_layernorm.weight",)
    with pytest.raises(KeyError, match="router"):
        TABLE.find_module_parameter("decoder.layers.0.mlp.router.weight", MIXED_ARCH)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("entry", TABLE.entries, ids=lambda entry: entry.key)
def test_shards_join_again_and_parts_come_back(entry: Any, tp_size: int) -> None:
    parts = [torch.randn(shape) for shape in entry.hf_shapes(MIXED_ARCH)]
    full = entry.to_megatron(parts, MIXED_ARCH)
    assert full.shape == entry.shape(MIXED_ARCH)
    shards = [entry.tp_shard(full, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    assert torch.equal(entry.tp_join(shards), full)
    back = entry.to_hf(full, MIXED_ARCH)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_experts_are_cut_like_dense_layers_and_routers_not_at_all() -> None:
    assert TABLE.by_key["decoder.layers.mlp.router.weight"].partition is Partition.REPLICATED
    fc1 = TABLE.by_key["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    gate, up = torch.randn(6, 20), torch.randn(6, 20)
    shard = fc1.tp_shard(fc1.to_megatron([gate, up], ARCH), tp_rank=1, tp_size=2)
    assert torch.equal(shard, torch.cat([gate[3:], up[3:]]))


def test_extra_states_by_layer_and_expert() -> None:
    names = set(FAMILY.extra_states(ARCH))
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_3.2_4.3" in names
    assert "decoder.layers.pre_mlp_layernorm._extra_state/shard_1_4" in names
    assert not any("layers.mlp.linear" in name for name in names)
    assert len(names) == 4 * (5 + 1 + 2 * 3)
    mixed = set(FAMILY.extra_states(MIXED_ARCH))
    assert "decoder.layers.3.mlp.experts.experts.linear_fc1._extra_state/shard_2_3" in mixed
    assert "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1" in mixed
    assert len(mixed) == 4 * 5 + 3 * 2 + 1 + 2 * 3


@pytest.mark.parametrize(("size", "active", "tensors"), [("30B", 3.35, 18867), ("235B", 22.19, 36945)])
def test_parameters_are_those_of_the_published_models(size: str, active: float, tensors: int) -> None:
    """Against the model that transformers builds, and against the number of active ones in the technical report."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    arch = read(**PUBLISHED[size])
    shapes = TABLE.hf_shapes(arch)
    assert len(shapes) == tensors
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**PUBLISHED[size]))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == sum(p.numel() for p in model.parameters())
    ends = 2 * arch.vocab_size * arch.hidden_size + arch.hidden_size
    layers = sum(TABLE.layer_parameters(layer, arch) for layer in range(arch.num_layers))
    assert ends + layers == sum(p.numel() for p in model.parameters())
    used = ends + sum(TABLE.layer_parameters(layer, arch, active=True) for layer in range(arch.num_layers))
    assert round(used / 1e9, 2) == active


def test_parameters_of_layers_that_differ() -> None:
    attention = 20 * 6 * (8 + 4 + 4) + 8 * 6 * 20 + 2 * 6 + 2 * 20
    dense, expert = 3 * 24 * 20, 3 * 6 * 20
    assert [TABLE.layer_parameters(layer, MIXED_ARCH) for layer in range(4)] == (
        [attention + dense] * 3 + [attention + 3 * 20 + 3 * expert]
    )
    assert TABLE.layer_parameters(3, MIXED_ARCH, active=True) == attention + 3 * 20 + 2 * expert


def test_megatron_arguments() -> None:
    args = FAMILY.megatron_arguments(ARCH)
    assert args == args | {
        "num_experts": 3, "moe_layer_freq": 1, "moe_ffn_hidden_size": 6, "ffn_hidden_size": 24, "moe_router_topk": 2,
        "moe_router_pre_softmax": False, "moe_router_score_function": "softmax", "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_token_dispatcher_type": "alltoall",
        "qk_layernorm": True, "add_qkv_bias": False, "num_layers": 4, "kv_channels": 6,
    }  # fmt: skip
    assert FAMILY.megatron_arguments(MIXED_ARCH)["moe_layer_freq"] == [0, 0, 0, 1]
    assert FAMILY.megatron_arguments(read(norm_topk_prob=False))["moe_router_pre_softmax"] is True
    absent = {name: value for name, value in CONFIG.items() if name != "norm_topk_prob"}
    assert FAMILY.megatron_arguments(FAMILY.read_architecture(absent))["moe_router_pre_softmax"] is True


@pytest.mark.parametrize(
    ("step", "listed", "experts"),
    [
        (1, [], [0, 1, 2, 3]),
        (1, None, [0, 1, 2, 3]),
        (2, [], [1, 3]),
        (2, [1], [3]),
        (3, [0], [2]),
        (1, [3, 0], [1, 2]),
    ],
)
def test_layers_with_experts_are_those_of_transformers(step: int, listed: list[int] | None, experts: list[int]) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from megatron_camopd.families.qwen3_moe.config import expert_layers

    config = CONFIG | {"decoder_sparse_step": step, "mlp_only_layers": listed}
    with torch.device("meta"):
        layers = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).model.layers
    built = [number for number, layer in enumerate(layers) if hasattr(layer.mlp, "experts")]
    assert list(expert_layers(FAMILY.read_architecture(config))) == built == experts


def test_both_names_of_the_number_of_experts() -> None:
    other = {name: value for name, value in CONFIG.items() if name != "num_experts"} | {"num_local_experts": 3}
    assert FAMILY.read_architecture(other) == ARCH == FAMILY.read_architecture(CONFIG | other)
    harmless = {"shared_expert_intermediate_size": 0, "routed_scaling_factor": 1.0, "n_group": None,
                "output_router_logits": False, "router_aux_loss_coef": 0.001, "sliding_window": 4096}  # fmt: skip
    assert FAMILY.read_architecture(CONFIG | harmless) == ARCH


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": None}, "num_experts is None; expected a positive integer"),
        ({"num_experts": 0}, "num_experts is 0; expected a positive integer"),
        ({"num_local_experts": 4}, "num_local_experts is 4; expected 3, as num_experts says"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None; expected a positive integer"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4; expected at most the number of experts, 3"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1; expected at least 2 with norm_topk_prob"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None; expected a positive integer"),
        ({"norm_topk_prob": "true"}, "norm_topk_prob is 'true'; expected true or false"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers is [4]; expected a list of layer numbers below 4"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers is [-1]; expected a list of layer numbers below 4"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers is [True]; expected a list of layer numbers"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers is '0'; expected a list of layer numbers"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers is [0, 1, 2, 3]; expected at least one layer with"),
        ({"decoder_sparse_step": 5}, "decoder_sparse_step is 5; expected at least one layer with experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected a positive integer"),
        ({"shared_expert_intermediate_size": 6}, "shared_expert_intermediate_size is 6; expected none: shared experts"),
        ({"n_shared_experts": 1}, "n_shared_experts is 1; expected none: shared experts"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; expected 'softmax'"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5; expected none"),
        ({"n_group": 8}, "n_group is 8; expected none: experts are not chosen by groups"),
        ({"topk_group": 4}, "topk_group is 4; expected none"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; expected none"),
        ({"attention_bias": True}, "attention_bias is True; expected false"),
        ({"mlp_bias": True}, "mlp_bias is True; expected false"),
        ({"use_sliding_window": True}, "use_sliding_window is True; expected false"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is ['sliding_attention']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
    ],
)
def test_unsupported_configs_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        config = CONFIG | change
        family_of(config, source="/models/x/config.json").read_architecture(config, source="/models/x/config.json")
    message = str(raised.value)
    assert words in message and message.startswith("/models/x/config.json: ") and "\n" not in message
