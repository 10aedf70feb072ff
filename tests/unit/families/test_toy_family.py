"""A family that exists here alone: what it states is enough for converters, flags, model, weight sync and dry run.

"Orchid" is no model of anybody's. Its tensors have other names than Qwen3's, queries and keys have no norms, Q, K and V
have biases, and rotary positions are scaled. "Bouquet" is a table whose feed-forward layers are split into experts.
"""

import dataclasses
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_camopd.checkpoint import assets
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.import_hf import import_hf
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from megatron_camopd.errors import ConfigurationError, StaleEngineError
from megatron_camopd.families import config_fields, registry
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.family import Family
from megatron_camopd.families.model_arguments import PLAIN_DECODER, decoder_arguments
from megatron_camopd.families.table import EMBEDDING_KEY, OUTPUT_KEY, Partition, TensorTable, layer_entry, model_entry
from tests.support.processes import run_ranks
from tests.support.worlds import SIZES, World, make_checkpoint, make_tokenizer, prepare, refusal, write_prompts

PREFIX = "transformer.h.{layer}."
SCALING = {"use_rope_scaling": True, "rope_scaling_factor": 4.0}


# The families -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrchidArchitecture(Architecture):
    """The sizes of an orchid, and by how much its rotary positions are scaled."""

    rope_scaling: float


def read_orchid(config: Mapping[str, Any], *, source: str = "config.json") -> OrchidArchitecture:
    factor = config_fields.positive_number(config.get("petals"), "petals", source)
    return OrchidArchitecture(**config_fields.decoder_fields(config, source), rope_theta=10000.0, rope_scaling=factor)


def orchid_arguments(arch: OrchidArchitecture) -> dict[str, Any]:
    scaling = {"use_rope_scaling": True, "rope_scaling_factor": arch.rope_scaling}
    return decoder_arguments(arch, qk_layernorm=False, add_qkv_bias=True) | scaling


def orchid_layers(config: Any, vp_stage: int | None = None) -> Any:
    from megatron_camopd.families.local_layers import plain_layers

    return plain_layers(config, vp_stage, qk_layernorm=False)


def heads(arch: Architecture) -> tuple[int, ...]:
    return tuple(n * arch.head_dim for n in (arch.num_heads, arch.num_query_groups, arch.num_query_groups))


def norm(key: str, name: str, local: str) -> Any:
    return layer_entry(key, [name], Partition.REPLICATED, lambda a: ((a.hidden_size,),), local=local, hf_prefix=PREFIX)


ENDS = (
    model_entry(EMBEDDING_KEY, "transformer.wte", Partition.VOCAB, lambda a: (a.vocab_size, a.hidden_size)),
    model_entry("decoder.final_layernorm.weight", "transformer.ln_f", Partition.REPLICATED, lambda a: (a.hidden_size,)),
    model_entry(OUTPUT_KEY, "head", Partition.VOCAB, lambda a: (a.vocab_size, a.hidden_size)),
)
ATTENTION = (
    norm("self_attention.linear_qkv.layer_norm_weight", "ln_1", "input_layernorm.weight"),
    layer_entry(
        "self_attention.linear_qkv.weight", ["attn.q_proj.w", "attn.k_proj.w", "attn.v_proj.w"], Partition.QKV,
        lambda a: tuple((rows, a.hidden_size) for rows in heads(a)), hf_prefix=PREFIX,
    ),
    layer_entry(
        "self_attention.linear_qkv.bias", ["attn.q_proj.b", "attn.k_proj.b", "attn.v_proj.b"], Partition.QKV,
        lambda a: tuple((rows,) for rows in heads(a)), hf_prefix=PREFIX,
    ),
    layer_entry(
        "self_attention.linear_proj.weight", ["attn.out.w"], Partition.ROW,
        lambda a: ((a.hidden_size, heads(a)[0]),), hf_prefix=PREFIX,
    ),
)  # fmt: skip
FEED_FORWARD = (
    norm("mlp.linear_fc1.layer_norm_weight", "ln_2", "pre_mlp_layernorm.weight"),
    layer_entry(
        "mlp.linear_fc1.weight", ["mlp.w1", "mlp.w3"], Partition.GATE_UP,
        lambda a: ((a.ffn_hidden_size, a.hidden_size),) * 2, hf_prefix=PREFIX,
    ),
    layer_entry(
        "mlp.linear_fc2.weight", ["mlp.w2"], Partition.ROW, lambda a: ((a.hidden_size, a.ffn_hidden_size),),
        hf_prefix=PREFIX,
    ),
)  # fmt: skip
ORCHID = Family(
    model_type="orchid",
    title="toy orchid",
    hf_class="OrchidForCausalLM",
    table=TensorTable([ENDS[0], *ATTENTION, *FEED_FORWARD, *ENDS[1:]]),
    read_architecture=read_orchid,
    megatron_arguments=orchid_arguments,
    local_layers=orchid_layers,
    extra_state_modules=(
        "self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj", "mlp.linear_fc1",
        "mlp.linear_fc2",
    ),
    fixed_arguments={name: value for name, value in PLAIN_DECODER.items() if name not in SCALING},
    vllm_fused={Partition.QKV: ("q_proj", "qkv_proj"), Partition.GATE_UP: ("w1", "w13")},
)  # fmt: skip

EXPERTS = (
    norm("pre_mlp_layernorm.weight", "ln_2", "pre_mlp_layernorm.weight"),
    layer_entry(
        "mlp.router.weight", ["mlp.router"], Partition.REPLICATED, lambda a: ((a.num_experts, a.hidden_size),),
        hf_prefix=PREFIX,
    ),
    layer_entry(
        "mlp.experts.experts.linear_fc1.weight", ["mlp.{expert}.w1", "mlp.{expert}.w3"], Partition.GATE_UP,
        lambda a: ((a.ffn_hidden_size, a.hidden_size),) * 2, hf_prefix=PREFIX,
        te="mlp.experts.linear_fc1.weight{expert}", local="mlp.experts.local_experts.{expert}.linear_fc1.weight",
    ),
    layer_entry(
        "mlp.experts.experts.linear_fc2.weight", ["mlp.{expert}.w2"], Partition.ROW,
        lambda a: ((a.hidden_size, a.ffn_hidden_size),), hf_prefix=PREFIX,
        te="mlp.experts.linear_fc2.weight{expert}", local="mlp.experts.local_experts.{expert}.linear_fc2.weight",
    ),
)  # fmt: skip


def read_bouquet(config: Mapping[str, Any], *, source: str = "config.json") -> OrchidArchitecture:
    experts = config_fields.positive_int(config, "flowers", source)
    return dataclasses.replace(read_orchid(config, source=source), num_experts=experts)


BOUQUET = dataclasses.replace(
    ORCHID,
    model_type="bouquet",
    title="toy bouquet",
    table=TensorTable([ENDS[0], *ATTENTION, *EXPERTS, *ENDS[1:]]),
    read_architecture=read_bouquet,
)


# Their folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The registry with both families in it."""
    with pytest.MonkeyPatch.context() as patch:
        for family in (ORCHID, BOUQUET):
            patch.setitem(registry.FAMILIES, family.model_type, family)
        yield


def make_folder(folder: Path, family: Family = ORCHID, *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with random weights, made without a model class."""
    folder.mkdir()
    config = SIZES | {"model_type": family.model_type, "petals": 4.0, "flowers": 3, "dtype": "float32"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    arch = family.read_architecture(config)
    generator = torch.Generator().manual_seed(seed)
    shapes = family.table.hf_shapes(arch)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file({name: tensor.to(arch.dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    make_tokenizer().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def orchids(tmp_path_factory: pytest.TempPathFactory, registered: None) -> World:
    """The inputs of a training run whose student and teacher are orchids."""
    made = World(tmp_path_factory.mktemp("orchids"))
    for seed, path in enumerate((made.student, made.teacher)):
        import_hf(make_folder(path.with_name(path.name + "-hf"), seed=seed), path)
    write_prompts(made.general, "general")
    write_prompts(made.domain, "domain")
    return made


# The registry -----------------------------------------------------------------------------------------------------


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "rose")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "rose"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError) as raised:
        import_hf(folder, tmp_path / "out")
    assert str(raised.value) == (
        f"{folder}/config.json: model_type is 'rose'; expected 'qwen3' (dense Qwen3) or 'qwen3_moe' "
        "(Qwen3 with experts) or 'orchid' (toy orchid) or 'bouquet' (toy bouquet)"
    )


# Converters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"dtype": "bfloat16", "num_key_value_heads": 4}])
@pytest.mark.parametrize("family", [ORCHID, BOUQUET], ids=lambda family: family.model_type)
def test_round_trip_is_bit_exact(family: Family, changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", family, **changes)
    exported = export_hf(import_hf(source, tmp_path / "megatron"), tmp_path / "out")
    found, expected = stored(exported), stored(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert ("head" in found) == ("tie_word_embeddings" not in changes)
    assert (exported / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_tied_model_may_repeat_its_embedding_by_the_familys_names(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", tie_word_embeddings=True)
    tensors = stored(source)
    save_file(tensors | {"head": tensors["transformer.wte"].clone()}, source / "model.safetensors")
    assert stored(export_hf(import_hf(source, tmp_path / "megatron"), tmp_path / "out")).keys() == tensors.keys()
    save_file(tensors | {"head": tensors["transformer.wte"] + 1}, source / "model.safetensors")
    with pytest.raises(ConfigurationError, match="tensor head differs from transformer.wte"):
        import_hf(source, tmp_path / "other")


def test_messages_call_the_family_by_its_name(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf")
    save_file(stored(source) | {"transformer.h.0.attn.q_norm": torch.ones(8)}, source / "model.safetensors")
    with pytest.raises(ConfigurationError, match="q_norm; expected only those of the toy orchid in config.json"):
        import_hf(source, tmp_path / "megatron")


def test_the_checkpoint_carries_arguments_and_extra_states_of_the_family(orchids: World) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    folder = orchids.student / "release"
    keys = FileSystemReader(folder).read_metadata().state_dict_metadata.keys()
    states = {key.split("._extra_state")[0] for key in keys if "_extra_state" in key}
    assert states == {"decoder.final_layernorm", *(f"decoder.layers.{name}" for name in ORCHID.extra_state_modules)}
    family, arch = assets.read_model(assets.assets_dir(orchids.student))
    assert family is ORCHID and isinstance(arch, OrchidArchitecture)
    assert family.megatron_arguments(arch) | SCALING | {"qk_layernorm": False, "add_qkv_bias": True} == (
        family.megatron_arguments(arch)
    )


def test_experts_are_stacked_behind_the_layers(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", BOUQUET)
    reader = TorchDistReader(import_hf(source, tmp_path / "megatron") / "release")
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert reader.shapes[key] == (2, 3, 96, 32)
    assert reader.shapes["decoder.layers.mlp.router.weight"] == (2, 3, 32)
    tensors = stored(source)
    expected = torch.cat([tensors["transformer.h.1.mlp.2.w1"], tensors["transformer.h.1.mlp.2.w3"]])
    assert torch.equal(reader.read(key, (1, 2, 0, 0), (1, 1, 96, 32))[0, 0], expected)


@pytest.mark.parametrize("name", ["mlp.experts.linear_fc1.weight2", "mlp.experts.local_experts.2.linear_fc1.weight"])
def test_both_spellings_of_an_expert(name: str) -> None:
    entry, index = BOUQUET.table.find_module_parameter(f"module.decoder.layers.11.{name}")
    assert index == (11, 2)
    assert entry.hf_names(index) == ("transformer.h.11.mlp.2.w1", "transformer.h.11.mlp.2.w3")


# A run ------------------------------------------------------------------------------------------------------------


def test_a_run_takes_the_familys_arguments(orchids: World, tmp_path: Path) -> None:
    args, _ = prepare([*orchids.flags(save=tmp_path / "run"), "--use-rope-scaling", "--add-qkv-bias"])
    assert (args.use_rope_scaling, args.rope_scaling_factor) == (True, 4.0)
    assert (args.add_qkv_bias, args.qk_layernorm) == (True, False)


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        (["--rope-scaling-factor", "2"], "has 4.0"),
        (["--qk-layernorm"], "is made without it"),
        (["--softmax-type", "off-by-one"], "has vanilla"),
        (["--moe-router-topk", "4"], "is a toy orchid"),
    ],
)
def test_flags_of_another_model_are_refused(flags: list[str], has: str, orchids: World, tmp_path: Path) -> None:
    line = refusal([*orchids.flags(save=tmp_path / "run"), *flags])
    assert line.startswith(flags[0]) and f": the model in --load {orchids.student} {has}; drop the flag" in line


def test_a_teacher_of_another_family_is_refused(orchids: World, tmp_path: Path) -> None:
    teacher = make_checkpoint(tmp_path / "teacher")
    line = refusal(orchids.flags(save=tmp_path / "run", general_teacher_load=teacher))
    assert line == (
        f"--general-teacher-load {teacher}: model-type is qwen3, the student's is orchid; teacher and student must be "
        "of one architecture"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_dry_run_counts_the_familys_tensors(tied: bool, orchids: World, tmp_path: Path) -> None:
    from megatron_camopd.stages.description import parameters
    from megatron_camopd.stages.registry import describe_stage

    source = make_folder(tmp_path / "hf", tie_word_embeddings=tied)
    student = import_hf(source, tmp_path / "student")
    args, plan = prepare(orchids.flags(load=student, general_teacher_load=student, save=tmp_path / "run"))
    sizes = parameters(args)
    embeddings = 1 if tied else 2
    padding = embeddings * (args.padded_vocab_size - args.vocab_size) * args.hidden_size
    total = sizes["layers"] + embeddings * sizes["embedding"] + sizes["norm"] - padding
    assert total == sum(tensor.numel() for tensor in stored(source).values())
    assert "2 layers, hidden 32" in describe_stage(args, plan)


def rank_main(line: list[str], source: str) -> dict[str, Any]:
    """Build the model, load the checkpoint, send the weights; then what vLLM would hold is compared with them."""
    registry.FAMILIES[ORCHID.model_type] = ORCHID
    from megatron_camopd.checkpoint.directory import require_checkpoint
    from megatron_camopd.checkpoint.training_state import load_weights
    from megatron_camopd.model.builder import build_model
    from megatron_camopd.rollout.freshness import EngineWeights
    from megatron_camopd.rollout.weight_sync import WeightSource
    from megatron_camopd.runtime.startup import initialize_megatron
    from megatron_camopd.stages.arguments import parse_arguments

    args = parse_arguments(line)
    initialize_megatron(args)
    model = build_model(args, trainable=False)
    load_weights(args, model, require_checkpoint("--load", args.load))
    family, arch = assets.read_model(assets.run_assets(args))
    expected = stored(Path(source))
    weights = EngineWeights(family, arch, tp_rank=0, tp_size=1)
    weights.restart()
    sent = {}
    for name, tensor in sent_by(model, family, arch, WeightSource):
        weights.record(name, tensor)
        sent[name] = tensor.clone()
    held = engine_parameters(sent, args)
    found = {
        "equal": sent.keys() - {"head"} == expected.keys() - {"head"}
        and all(torch.equal(sent[name], tensor) for name, tensor in expected.items()),
        "names": sorted(name for name, _ in model[0].named_parameters() if "layers.0" in name),
        "checked": weights.check(held.items()).checked,
        "parameters": len(held),
    }
    held["transformer.h.1.attn.qkv_proj.b"] = held["transformer.h.1.attn.qkv_proj.b"] + 1e-3
    with pytest.raises(StaleEngineError, match=r"transformer\.h\.1\.attn\.q_proj\.b is not what was sent"):
        weights.check(held.items())
    return found


def sent_by(model: Any, family: Family, arch: Architecture, source: Any) -> Iterator[tuple[str, Tensor]]:
    return source(model, family, arch, dtype=torch.float32, bucket_bytes=10_000).tensors()


def engine_parameters(sent: dict[str, Tensor], args: Namespace) -> dict[str, Tensor]:
    """Return what a vLLM on one rank would hold, written out by hand."""
    held = {name: sent[name] for name in sent if "_proj" not in name and not name.endswith(("w1", "w3"))}
    rows = -(-args.vocab_size // 64) * 64 - args.vocab_size
    for name in ("transformer.wte", "head"):
        held[name] = torch.cat((sent[name], torch.zeros(rows, args.hidden_size)))
    for layer in range(args.num_layers):
        prefix = f"transformer.h.{layer}."
        for kind in ("w", "b"):
            held[f"{prefix}attn.qkv_proj.{kind}"] = torch.cat([sent[f"{prefix}attn.{p}_proj.{kind}"] for p in "qkv"])
        held[f"{prefix}mlp.w13"] = torch.cat([sent[f"{prefix}mlp.{part}"] for part in ("w1", "w3")])
    return held


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_model_and_weight_sync_are_the_familys(layout: str, tied: bool, orchids: World, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", tie_word_embeddings=tied, seed=3)
    student = import_hf(source, tmp_path / "student")
    line = orchids.flags(load=student, general_teacher_load=student, save=tmp_path / "run", **{layout: 2})
    for rank in run_ranks(rank_main, 2, line, str(source), time_limit=120):
        assert rank["equal"]
        assert rank["checked"] == rank["parameters"] == 3 + 7 * 2
        assert any(name.endswith("self_attention.linear_qkv.bias") for name in rank["names"])
        assert not any("q_layernorm" in name or "k_layernorm" in name for name in rank["names"])
