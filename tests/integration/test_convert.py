"""Conversion between Hugging Face and Megatron: bit-exact, loadable by Megatron, strict about its input.

One process on the CPU; Megatron runs its local layers. Tensor-parallel ranks are played by describing their shards.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_camopd.checkpoint import assets
from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.import_hf import import_hf
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from megatron_camopd.config.byte_size import parse_size
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.qwen3 import FAMILY
from megatron_camopd.families.table import Partition
from tests.support.damage import flip_bit

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 74,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden / heads
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "tied-fp32": ({"tie_word_embeddings": True}, torch.float32, "1GB"),
    "untied-bf16-shards": ({"tie_word_embeddings": False}, torch.bfloat16, "20KB"),
    "untied-fp32-shards": ({"tie_word_embeddings": False, "num_key_value_heads": 4}, torch.float32, "30KB"),
    "tied-bf16": ({"tie_word_embeddings": True, "num_key_value_heads": 1}, torch.bfloat16, "1GB"),
}

Maker = Callable[[str], Path]


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """``hf_model(variant)``: a Hugging Face folder with random weights, norms included, and a tokenizer; made once."""
    root = tmp_path_factory.mktemp("hf")

    def make(variant: str) -> Path:
        folder = root / variant
        if not folder.exists():
            changes, dtype, shard_size = VARIANTS[variant]
            torch.manual_seed(7)
            model = Qwen3ForCausalLM(Qwen3Config(**(SIZES | changes))).to(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.1 + ("norm" in name))
            model.save_pretrained(folder, max_shard_size=shard_size)
            backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="<e>"))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
            tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def imported(hf_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """``imported(variant)``: the Megatron checkpoint directory of a variant; made once."""
    root = tmp_path_factory.mktemp("megatron")

    def make(variant: str) -> Path:
        target = root / variant
        return target if target.exists() else import_hf(hf_model(variant), target)

    return make


@pytest.fixture
def broken(hf_model: Maker, tmp_path: Path) -> Path:
    """A copy of a sharded model, to be damaged by the test."""
    return Path(shutil.copytree(hf_model("untied-bf16-shards"), tmp_path / "broken"))


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's parallel state for one process, without CUDA."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "synchronize", lambda: None)
        store = tmp_path_factory.mktemp("store") / "rendezvous"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        # Without dropout no random numbers are drawn; this tracker does not touch CUDA generators.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        yield
        initialize_rng_tracker(force_reset=True)
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_gpt(config: dict[str, Any]) -> torch.nn.Module:
    """Megatron's GPTModel with local layers, built from the very arguments that the importer writes."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    args = FAMILY.megatron_arguments(FAMILY.read_architecture(config))
    same = ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"]
    same += ["normalization", "layernorm_epsilon", "qk_layernorm", "add_bias_linear", "add_qkv_bias"]
    same += ["attention_dropout", "hidden_dropout"]
    transformer = TransformerConfig(
        **{name: args[name] for name in same},
        gated_linear_unit=args["swiglu"],
        activation_func=torch.nn.functional.silu,
        attention_backend=AttnBackend.unfused,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        transformer,
        get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
        rotary_percent=args["rotary_percent"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
    ).eval()


def load_gpt(checkpoint: Path) -> torch.nn.Module:
    model = build_gpt(assets.read_config(assets.assets_dir(checkpoint)))
    fill_gpt(model, checkpoint / "release")
    return model


def fill_gpt(model: torch.nn.Module, folder: Path) -> None:
    """Load all parameters as Megatron does; none may be missing."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=None)}, str(folder))
    model.load_state_dict(loaded["model"], strict=True)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, read with the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_exact(variant: str, hf_model: Maker, imported: Maker, tmp_path: Path) -> None:
    source = hf_model(variant)
    assert (len(list(source.glob("*.safetensors"))) > 1) == ("shards" in variant)
    exported = export_hf(imported(variant), tmp_path / "out", max_shard_bytes=30_000)
    assert_identical(stored(exported), stored(source))
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(source).values())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_exported_folder_opens_with_transformers(hf_model: Maker, imported: Maker, tmp_path: Path) -> None:
    exported = export_hf(imported("tied-bf16"), tmp_path / "out")
    assert [path.name for path in exported.glob("*.safetensors*")] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(exported)
    original = AutoModelForCausalLM.from_pretrained(hf_model("tied-bf16"))
    tokens = torch.arange(12)[None]
    assert model.dtype == torch.bfloat16 and torch.equal(model(tokens).logits, original(tokens).logits)
    assert AutoTokenizer.from_pretrained(exported).eos_token == "<e>"


@pytest.mark.parametrize("variant", ["tied-fp32", "untied-fp32-shards"])
def test_megatron_computes_the_same_logits(variant: str, hf_model: Maker, imported: Maker, megatron: None) -> None:
    model = load_gpt(imported(variant))
    reference = AutoModelForCausalLM.from_pretrained(hf_model(variant), attn_implementation="eager").eval()
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(24).expand(2, -1)
    causal = torch.ones(24, 24, dtype=torch.bool).triu(1)[None, None]  # True is masked
    with torch.no_grad():
        logits = model(tokens, positions, causal)
        expected = reference(tokens).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits[..., : SIZES["vocab_size"]], expected, rtol=0, atol=1e-4)
    assert not logits[..., SIZES["vocab_size"] :].any()  # the phantom vocabulary has zero weights


def test_table_names_what_megatron_names(imported: Maker, megatron: None) -> None:
    """Keys, shapes and offsets of a real model's sharded state dict, its extra states included."""
    for variant in ("tied-fp32", "untied-fp32-shards"):
        config = assets.read_config(assets.assets_dir(imported(variant)))
        arch = FAMILY.read_architecture(config)
        model = build_gpt(config)
        for name, _ in model.named_parameters():
            FAMILY.table.find_module_parameter(name)
        wanted: dict[str, tuple[int, ...]] = {}
        objects = set()
        for entry in model.sharded_state_dict(metadata=None).values():
            for part in entry.build() if hasattr(entry, "build") else [entry]:
                if hasattr(part, "unique_key"):
                    objects.add(part.unique_key)
                else:
                    wanted[part.key] = tuple(part.global_shape)
        assert wanted == {e.key: e.checkpoint_shape(arch) for e in FAMILY.table.model_entries(arch)}
        reader = TorchDistReader(imported(variant) / "release")
        assert reader.shapes == wanted
        assert objects and objects <= reader._metadata.state_dict_metadata.keys()


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_vocabulary_loads_at_other_paddings(tp_size: int, hf_model: Maker, imported: Maker, megatron: None) -> None:
    """Megatron pads to 128 x TP rows; what the checkpoint lacks becomes zeros, on every rank."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    key = "output_layer.weight"
    shards = []
    for rank in range(tp_size):
        shard = ShardedTensor.from_rank_offsets(
            key, torch.full((128, SIZES["hidden_size"]), torch.nan), (0, rank, tp_size), allow_shape_mismatch=True
        )
        folder = str(imported("untied-fp32-shards") / "release")
        shards.append(dist_checkpointing.load({key: shard}, folder, validate_access_integrity=False)[key])
    expected = stored(hf_model("untied-fp32-shards"))["lm_head.weight"]
    joined = torch.cat(shards)
    assert torch.equal(joined[: SIZES["vocab_size"]], expected) and not joined[SIZES["vocab_size"] :].any()


@pytest.mark.parametrize("tp_size", [2, 4])
def test_layers_load_as_tensor_parallel_shards(tp_size: int, imported: Maker, megatron: None) -> None:
    """A rank that asks for its shard of one layer gets what the table says it holds."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    folder = imported("untied-fp32-shards")
    arch = FAMILY.read_architecture(assets.read_config(assets.assets_dir(folder)))
    reader = TorchDistReader(folder / "release")
    layer, rank = 2, tp_size - 1
    for entry in [entry for entry in FAMILY.table.entries if entry.per_layer]:
        shape = entry.shape(arch)
        full = reader.read(entry.key, (layer,) + (0,) * len(shape), (1, *shape))[0]
        expected = entry.tp_shard(full, tp_rank=rank, tp_size=tp_size)
        pieces = expected.chunk(2) if entry.partition is Partition.GATE_UP else (expected,)
        for half, piece in enumerate(pieces):
            axis = entry.partition.dim
            cut = [] if axis is None else [(axis + 1, half * tp_size + rank, tp_size * len(pieces))]
            shard = ShardedTensor.from_rank_offsets(
                entry.key, torch.zeros_like(piece)[None], (0, layer, arch.num_layers), *cut
            )
            loaded = dist_checkpointing.load(
                {entry.key: shard}, str(folder / "release"), validate_access_integrity=False
            )
            assert torch.equal(loaded[entry.key][0], piece), entry.key


def test_checkpoint_carries_the_arguments(imported: Maker, megatron: None) -> None:
    from megatron.core import dist_checkpointing

    folder = imported("tied-fp32")
    assert (folder / TRACKER).read_text() == "release"
    common = dist_checkpointing.load_common_state_dict(str(folder / "release"))
    expected = FAMILY.megatron_arguments(FAMILY.read_architecture(assets.read_config(assets.assets_dir(folder))))
    assert vars(common["args"]) == vars(common["args"]) | expected
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)


@pytest.mark.parametrize("variant", ["untied-bf16-shards", "tied-fp32"])
def test_export_of_a_training_checkpoint(
    variant: str, hf_model: Maker, imported: Maker, megatron: None, tmp_path: Path
) -> None:
    """A checkpoint of a training run holds optimizer states beside the weights, and a padded vocabulary."""
    from megatron.core import dist_checkpointing

    source = imported(variant)
    config = assets.read_config(assets.assets_dir(source))
    model = build_gpt(config | {"vocab_size": 74 + 128 * 3}).to(VARIANTS[variant][1])
    fill_gpt(model, source / "release")
    run = tmp_path / "run"
    folder = run / "iter_0000010"
    folder.mkdir(parents=True)
    state = {"model": model.sharded_state_dict(metadata=None), "optimizer": model.sharded_state_dict(metadata=None)}
    for entry in state["optimizer"].values():
        entry.key = f"optimizer.state.exp_avg.{entry.key}"
    dist_checkpointing.save(state | {"iteration": 10}, str(folder))
    (run / TRACKER).write_text("10")
    assets.copy_assets(assets.assets_dir(source), assets.assets_dir(run))
    assert TorchDistReader(folder).shapes["embedding.word_embeddings.weight"][0] == 512
    assert_identical(stored(export_hf(run, tmp_path / "newest")), stored(hf_model(variant)))
    assert_identical(stored(export_hf(run, tmp_path / "tenth", iteration=10)), stored(hf_model(variant)))
    with pytest.raises(ConfigurationError, match=r"--load .*iter_0000011; found: iter_0000010"):
        export_hf(run, tmp_path / "eleventh", iteration=11)
    # A save that was interrupted, and a tracker cut short: the newest complete checkpoint counts.
    interrupted = shutil.copytree(folder, run / "iter_0000011")
    (interrupted / ".metadata").unlink()
    with pytest.raises(ConfigurationError, match=r"no complete checkpoint iter_0000011; found: iter_0000010"):
        export_hf(run, tmp_path / "eleventh", iteration=11)
    for number, text in enumerate(("11", "1", "")):
        (run / TRACKER).write_text(text)
        assert_identical(stored(export_hf(run, tmp_path / f"fallback-{number}")), stored(hf_model(variant)))


def test_stored_dtype_can_be_chosen(hf_model: Maker, tmp_path: Path) -> None:
    source = hf_model("untied-bf16-shards")
    (tmp_path / "megatron").mkdir()  # an empty folder is a fine target
    checkpoint = import_hf(source, tmp_path / "megatron", dtype=torch.float32)
    reader = TorchDistReader(checkpoint / "release")
    assert {reader.dtype(key) for key in reader.shapes} == {torch.float32}
    assert_identical(stored(export_hf(checkpoint, tmp_path / "out")), stored(source))


def test_tied_model_may_repeat_its_embedding(hf_model: Maker, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = shutil.copytree(hf_model("tied-fp32"), tmp_path / "source")
    tensors = stored(source)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    exported = export_hf(import_hf(source, tmp_path / "megatron"), tmp_path / "out")
    assert_identical(stored(exported), tensors)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, source / "model.safetensors")
    with pytest.raises(ConfigurationError, match="lm_head.weight differs from model.embed_tokens.weight"):
        import_hf(source, tmp_path / "other")


def drop_tensor(folder: Path, name: str) -> None:
    from safetensors.torch import save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"].pop(name)
    with safe_open(path, framework="pt") as file:
        save_file({key: file.get_tensor(key) for key in file.keys() if key != name}, path)  # noqa: SIM118
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_tensor(folder: Path, name: str, new_name: str, tensor: torch.Tensor) -> None:
    from safetensors.torch import save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors | {new_name: tensor}, path)
    index["weight_map"][new_name] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut_short(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, r"--hf-path .*broken: is no folder"),
    "empty folder": (empty, r"--hf-path .*broken: is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), r"config\.json: cannot be read"),
    "other model": (lambda f: change_config(f, model_type="llama"), r"config\.json: model_type is 'llama'"),
    "missing shard": (
        lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), r"model-00002-of-\d+\.safetensors: no such file",
    ),
    "cut shard": (cut_short, r"model-00002-of-\d+\.safetensors: cannot be read .incomplete metadata"),
    "empty shard": (
        lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b""), r"model-00001.*: cannot be read .header too",
    ),
    "missing tensor": (lambda f: drop_tensor(f, NORM), rf"lacks tensor {NORM}; config\.json implies it"),
    "unexpected tensor": (
        lambda f: replace_tensor(f, NORM, NORM.replace("weight", "bias"), torch.zeros(40, dtype=torch.bfloat16)),
        r"unexpected tensor model\.layers\.1\.input_layernorm\.bias",
    ),
    "wrong shape": (
        lambda f: replace_tensor(f, NORM, NORM, torch.zeros(41, dtype=torch.bfloat16)),
        rf"tensor {NORM} has shape \(41,\); config\.json implies \(40,\)",
    ),
    "other dtype": (
        lambda f: replace_tensor(f, NORM, NORM, torch.zeros(40, dtype=torch.float16)), rf"{NORM} has dtype F16",
    ),
    "mixed dtype": (
        lambda f: replace_tensor(f, NORM, NORM, torch.zeros(40)), rf"{NORM} has torch\.float32 but .* --dtype",
    ),
    "index outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}'),
        r"index\.json: weight_map leaves the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_input_is_named_and_leaves_nothing(damage: str, broken: Path, tmp_path: Path) -> None:
    spoil, words = DAMAGE[damage]
    spoil(broken)
    with pytest.raises(ConfigurationError, match=words) as raised:
        import_hf(broken, tmp_path / "target")
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"broken"}


def test_targets_that_cannot_be_written(hf_model: Maker, imported: Maker, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    under_a_file = full / "something" / "below"
    for target, words in ((full, "is a folder that is not empty"), (under_a_file, "cannot be written")):
        with pytest.raises(ConfigurationError, match=f"--save .*{words}"):
            import_hf(hf_model("tied-fp32"), target)
        with pytest.raises(ConfigurationError, match=f"--save .*{words}"):
            export_hf(imported("tied-fp32"), target)
    assert [path.name for path in full.iterdir()] == ["something"] and not list(tmp_path.glob(".*"))


def test_damaged_checkpoints_are_named(imported: Maker, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"--load .*: holds no complete .*; expected {TRACKER}"):
        export_hf(tmp_path, tmp_path / "out")
    copy = shutil.copytree(imported("tied-fp32"), tmp_path / "copy")
    data = next((copy / "release").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ConfigurationError, match=r"\.distcp: chunk of tensor .* cannot be read"):
        export_hf(copy, tmp_path / "out")
    change_config(copy / "hf", num_hidden_layers=4)
    with pytest.raises(ConfigurationError, match=r"linear_qkv.* has shape \(3, .*implies \(4, "):
        export_hf(copy, tmp_path / "out")
    (copy / "release" / ".metadata").write_bytes(f"cposix\nmkdir\n(S'{tmp_path}/made'\ntR.".encode())
    with pytest.raises(ConfigurationError, match=r"\.metadata: holds no tensor metadata"):
        export_hf(copy, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}  # and the code in the pickle did not run


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_nothing_is_exported_from_files_with_another_checksum(name: str, imported: Maker, tmp_path: Path) -> None:
    """A flipped bit gives another weight, or none at all; both are found before the folder gets its name."""
    copy = Path(shutil.copytree(imported("tied-fp32"), tmp_path / "copy"))
    flip_bit(copy / "release" / name, at=0.6)
    with pytest.raises(ConfigurationError) as raised:
        export_hf(copy, tmp_path / "out")
    assert "\n" not in str(raised.value) and str(copy) in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_assets_travel_on(imported: Maker, tmp_path: Path) -> None:
    source = assets.assets_dir(imported("tied-fp32"))
    target = assets.assets_dir(tmp_path / "run")
    for _ in range(2):  # a resumed run copies again
        assets.copy_assets(source, target)
        assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    assets.copy_assets(target, target)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        assets.copy_assets(tmp_path, target)


def test_sizes() -> None:
    sizes = {"4GB": 4 * 10**9, "500MB": 5 * 10**8, "1.5GiB": 3 * 2**29, "10 kb": 10_000, "123": 123}
    assert {text: parse_size(text, flag="--x") for text in sizes} == sizes
    for text in ("", "GB", "4TB", "-1GB", "0"):
        with pytest.raises(ConfigurationError, match="--max-shard-size .*is no size"):
            parse_size(text, flag="--max-shard-size")


def test_commands(hf_model: Maker, tmp_path: Path) -> None:
    def run(command: str, *flags: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, str(ROOT / "checkpoints_convert" / command), *map(str, flags)]
        return subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)

    source = hf_model("untied-bf16-shards")
    there = run("hf_to_megatron.py", "--hf-path", source, "--save", "megatron")
    assert there.returncode == 0 and not there.stderr, there.stderr  # the progress bar is for terminals
    back = run("megatron_to_hf.py", "--load", "megatron", "--save", "hf", "--max-shard-size", "20KB")
    assert back.returncode == 0, back.stderr
    assert_identical(stored(tmp_path / "hf"), stored(source))
    wrong = run("hf_to_megatron.py", "--hf-path", source, "--save", "megatron")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
    assert wrong.stderr.startswith("hf_to_megatron.py: error: --save ")
    wrong = run("megatron_to_hf.py", "--load", "nowhere", "--save", "other")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
    assert wrong.stderr.startswith("megatron_to_hf.py: error: --load ")
