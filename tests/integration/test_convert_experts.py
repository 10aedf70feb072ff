"""Conversion of models with experts: bit-exact, the logits of transformers, any parallel layout, little memory.

A model of two kinds of layers (``mixed``) has other keys in a checkpoint than one whose layers are equal.
"""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_camopd.checkpoint import assets
from megatron_camopd.checkpoint.checksums import hash_files, write_checksums
from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.import_hf import import_hf
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from megatron_camopd.errors import ConfigurationError
from tests.support.processes import ROOT, run_ranks
from tests.support.worlds import EXPERTS, SIZES, make_hf_model, make_tokenizer

FOUR = {"num_hidden_layers": 4, "head_dim": 16}
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "top2-fp32": (FOUR, torch.float32),
    "top4-fp32": (FOUR | {"num_experts_per_tok": 4, "norm_topk_prob": False}, torch.float32),
    "top4-normalised-fp32": (FOUR | {"num_experts_per_tok": 4}, torch.float32),
    "top2-plain-fp32": (FOUR | {"norm_topk_prob": False, "tie_word_embeddings": True}, torch.float32),
    "mixed-fp32": (FOUR | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, torch.float32),
    "mixed-half-fp32": (FOUR | {"decoder_sparse_step": 2, "tie_word_embeddings": True}, torch.float32),
    "top2-bf16": (FOUR | {"tie_word_embeddings": True}, torch.bfloat16),
    "mixed-bf16": (FOUR | {"mlp_only_layers": [2]}, torch.bfloat16),
}
Maker = Callable[[str], Path]


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """``hf_model(variant)``: a folder in shards, with random weights that no initialisation makes small; made once."""
    root = tmp_path_factory.mktemp("hf")

    def make(variant: str) -> Path:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        folder = root / variant
        if not folder.exists():
            changes, dtype = VARIANTS[variant]
            torch.manual_seed(7)
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(SIZES | EXPERTS | changes))).to(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name))
            model.save_pretrained(folder, max_shard_size="60KB")
            make_tokenizer().save_pretrained(folder)
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


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, read with the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def is_mixed(variant: str) -> bool:
    return variant.startswith("mixed")


# Both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_exact(variant: str, hf_model: Maker, imported: Maker, tmp_path: Path) -> None:
    source = hf_model(variant)
    assert len(list(source.glob("*.safetensors"))) > 1
    exported = export_hf(imported(variant), tmp_path / "out", max_shard_bytes=40_000)
    assert_identical(stored(exported), stored(source))
    assert len(list(exported.glob("*.safetensors"))) > 1
    assert (exported / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("variant", ["top2-fp32", "mixed-fp32"])
def test_checkpoint_keys_hold_the_rows_of_their_expert(variant: str, hf_model: Maker, imported: Maker) -> None:
    reader, tensors = TorchDistReader(imported(variant) / "release"), stored(hf_model(variant))
    key, lead = ("decoder.layers.3.mlp.", ()) if is_mixed(variant) else ("decoder.layers.mlp.", (3,))
    stacked = (8,) if is_mixed(variant) else (4, 8)
    assert reader.shapes[f"{key}experts.experts.linear_fc1.weight"] == (*stacked, 48, 32)
    ones = (1,) * len(stacked)
    prefix = "model.layers.3.mlp.experts.5."
    fc1 = reader.read(f"{key}experts.experts.linear_fc1.weight", (*lead, 5, 0, 0), (*ones, 48, 32))
    gate_up = torch.cat([tensors[f"{prefix}{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(fc1.view(48, 32), gate_up)
    fc2 = reader.read(f"{key}experts.experts.linear_fc2.weight", (*lead, 5, 0, 0), (*ones, 32, 24))
    assert torch.equal(fc2.view(32, 24), tensors[f"{prefix}down_proj.weight"])


def logit_difference(source: str, checkpoint: str) -> float:
    from megatron_camopd.model.verify import compare_logits

    return compare_logits(source, checkpoint)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if "fp32" in variant])
def test_logits_are_those_of_transformers(variant: str, hf_model: Maker, imported: Maker) -> None:
    (difference,) = run_ranks(logit_difference, 1, str(hf_model(variant)), str(imported(variant)))
    assert difference < 2e-5


def test_logits_of_a_dense_model_are_those_of_transformers(tmp_path: Path) -> None:
    source = make_hf_model(tmp_path / "hf")
    (difference,) = run_ranks(logit_difference, 1, str(source), str(import_hf(source, tmp_path / "megatron")))
    assert difference < 2e-5


def test_probabilities_that_are_normalised_otherwise_are_noticed(
    hf_model: Maker, imported: Maker, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(hf_model("top2-fp32"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    with pytest.raises(AssertionError, match="its logits differ from those of .*; convert again"):
        run_ranks(logit_difference, 1, str(other), str(imported("top2-fp32")))


def test_the_command_verifies(hf_model: Maker, tmp_path: Path) -> None:
    script = ROOT / "checkpoints_convert" / "hf_to_megatron.py"
    flags = ["--hf-path", str(hf_model("mixed-fp32")), "--save", str(tmp_path / "out"), "--verify"]
    result = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("verify: largest logit difference"))
    assert float(line.split()[-1]) < 2e-5


# Parallel layouts -------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2-EP2-ETP1": (
        2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "PP2-EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2-EP2-ETP2": (
        4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
}  # fmt: skip


def loaded_model(checkpoint: str, sizes: dict[str, int]) -> tuple[Any, Any]:
    """Arguments and model of this rank, with the weights of ``checkpoint``; runs refuse some of these layouts."""
    from megatron_camopd.checkpoint import arguments
    from megatron_camopd.checkpoint.directory import require_checkpoint
    from megatron_camopd.checkpoint.training_state import load_weights
    from megatron_camopd.model.builder import build_model
    from megatron_camopd.model.output_head import HeadSettings
    from megatron_camopd.runtime.startup import initialize_megatron

    flags = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    if sizes.get("tensor_model_parallel_size", 1) > 1:
        flags.append("--sequence-parallel")
    args, _ = arguments.parse_command_line(
        ["--load", checkpoint, "--global-batch-size", "4", *flags], [HeadSettings], {}
    )
    args.resume, args.resumed, args.camopd_state = False, None, None
    arguments._take_architecture(args, {})
    args.seq_length = args.max_position_embeddings
    arguments._validate(args)
    args.padded_vocab_size = arguments.padded_vocab_size(args)
    initialize_megatron(args)
    (model,) = build_model(args, trainable=False)
    load_weights(args, [model], require_checkpoint("--load", checkpoint))
    return args, model


def wrong_parameters(source: str, checkpoint: str, sizes: dict[str, int], saved: str) -> list[str]:
    """Load on this layout; return the parameters that are not what Hugging Face's tensors say, then save.

    The expected shards are cut here by hand.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from megatron.core.utils import unwrap_model

    _, wrapped = loaded_model(checkpoint, sizes)
    model = unwrap_model(wrapped)
    tensors = stored(Path(source))
    first = get_transformer_layer_offset(model.config)
    wrong, seen = [], 0
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[1] != "layers":
            continue
        prefix, rest = f"model.layers.{first + int(words[2])}.", ".".join(words[3:])
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        if "local_experts" in rest:
            rank = parallel_state.get_expert_tensor_parallel_rank()
            size = parallel_state.get_expert_tensor_parallel_world_size()
            here = 8 // parallel_state.get_expert_model_parallel_world_size()
            expert = int(words[6]) + here * parallel_state.get_expert_model_parallel_rank()
            prefix += f"mlp.experts.{expert}."
        elif rest.startswith("mlp.linear"):
            prefix += "mlp."
        if rest.endswith("linear_fc1.weight"):
            parts = [tensors[f"{prefix}{part}_proj.weight"].chunk(size)[rank] for part in ("gate", "up")]
            expected = torch.cat(parts)
        elif rest.endswith("linear_fc2.weight"):
            expected = tensors[f"{prefix}down_proj.weight"].chunk(size, dim=1)[rank]
        elif rest == "mlp.router.weight":
            expected = tensors[f"{prefix}mlp.gate.weight"]
        elif rest == "pre_mlp_layernorm.weight":
            expected = tensors[f"{prefix}post_attention_layernorm.weight"]
        else:
            continue
        seen += 1
        if not torch.equal(parameter, expected):
            wrong.append(name)
    assert seen > 0
    torch.distributed.barrier()
    state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    if torch.distributed.get_rank() == 0:
        Path(saved).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state | {"iteration": 10}, saved)
    return wrong


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*((layout, "top2-fp32") for layout in LAYOUTS), ("TP2-EP2-ETP1", "mixed-fp32"), ("PP2-EP2", "mixed-fp32")],
)
def test_a_checkpoint_loads_at_any_layout_and_comes_back(
    layout: str, variant: str, hf_model: Maker, imported: Maker, tmp_path: Path
) -> None:
    """What is saved at that layout, in Megatron's own way, is exported bit for bit."""
    ranks, sizes = LAYOUTS[layout]
    run = tmp_path / "run"
    source, checkpoint = str(hf_model(variant)), str(imported(variant))
    found = run_ranks(wrong_parameters, ranks, source, checkpoint, sizes, str(run / "iter_0000010"))
    assert found == [[]] * ranks
    (run / TRACKER).write_text("10")
    assets.copy_assets(assets.assets_dir(imported(variant)), assets.assets_dir(run))
    assert_identical(stored(export_hf(run, tmp_path / "out")), stored(hf_model(variant)))


def logits_difference_of_layout(source: str, checkpoint: str, sizes: dict[str, int]) -> float:
    """Each rank computes tokens of its own, so that experts receive unequal numbers of them from each."""
    from transformers import Qwen3MoeForCausalLM

    args, model = loaded_model(checkpoint, sizes)
    length = 24 + 9 * torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    tokens = torch.randint(args.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        logits = model(tokens, torch.arange(length).expand(2, -1), None)[..., : args.vocab_size]
        expected = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(tokens).logits
    assert expected.abs().max() > 1
    return float((logits - expected).abs().max())


@pytest.mark.parametrize("variant", ["top4-fp32", "mixed-fp32"])
def test_logits_with_experts_on_several_ranks(variant: str, hf_model: Maker, imported: Maker) -> None:
    sizes = {"expert_model_parallel_size": 2}
    found = run_ranks(logits_difference_of_layout, 2, str(hf_model(variant)), str(imported(variant)), sizes)
    assert max(found) < 2e-5


def keys_of_model(checkpoint: str) -> list[dict[str, tuple[int, ...]]]:
    _, model = loaded_model(checkpoint, {})
    tensors, objects = {}, {}
    for entry in model.sharded_state_dict(metadata={"singleton_local_shards": False}).values():
        for part in entry.build() if hasattr(entry, "build") else [entry]:
            if hasattr(part, "unique_key"):
                objects[part.unique_key] = ()
            else:
                tensors[part.key] = tuple(part.global_shape)
    return [tensors, objects]


@pytest.mark.parametrize("variant", ["top2-fp32", "mixed-fp32"])
def test_the_checkpoint_has_the_keys_of_a_real_model(variant: str, imported: Maker) -> None:
    checkpoint = imported(variant)
    ((tensors, objects),) = run_ranks(keys_of_model, 1, str(checkpoint))
    reader = TorchDistReader(checkpoint / "release")
    vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert {key: shape for key, shape in reader.shapes.items() if key not in vocabulary} == {
        key: shape for key, shape in tensors.items() if key not in vocabulary
    }
    assert objects and objects.keys() <= reader._metadata.state_dict_metadata.keys()


def sent_weights(source: str, checkpoint: str, sizes: dict[str, int]) -> bool:
    """Whether a weight sync sends exactly the tensors of Hugging Face's folder."""
    from megatron_camopd.rollout.weight_sync import WeightSource

    args, model = loaded_model(checkpoint, sizes)
    family, arch = assets.read_model(assets.run_assets(args))
    weights = WeightSource([model], family, arch, dtype=torch.float32, bucket_bytes=20_000)
    sent = {name: tensor.clone() for name, tensor in weights.tensors()}
    assert_identical(sent, stored(Path(source)))
    return True


@pytest.mark.parametrize("variant", ["top2-fp32", "mixed-fp32"])
@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_an_engine_is_sent_every_expert(layout: str, variant: str, hf_model: Maker, imported: Maker) -> None:
    ranks, sizes = LAYOUTS[layout]
    assert run_ranks(sent_weights, ranks, str(hf_model(variant)), str(imported(variant)), sizes) == [True] * ranks


# Refusals ---------------------------------------------------------------------------------------------------------


def drop_tensor(folder: Path, name: str) -> None:
    from safetensors.torch import save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"].pop(name)
    with safe_open(path, framework="pt") as file:
        save_file({key: file.get_tensor(key) for key in file.keys() if key != name}, path)  # noqa: SIM118
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_expert_tensor_is_named(part: str, hf_model: Maker, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hf_model("mixed-fp32"), tmp_path / "hf"))
    name = f"model.layers.3.mlp.experts.6.{part}.weight"
    drop_tensor(source, name)
    with pytest.raises(ConfigurationError) as raised:
        import_hf(source, tmp_path / "out")
    assert str(raised.value) == f"{source}: lacks tensor {name}; config.json implies it"
    assert not (tmp_path / "out").exists()


def test_experts_that_the_config_does_not_have_are_named(hf_model: Maker, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hf_model("top2-fp32"), tmp_path / "hf"))
    config = json.loads((source / "config.json").read_text())
    for change, words in (
        ({"num_local_experts": 7}, r"has unexpected tensor model.layers.0.mlp.experts.7.down_proj.weight and 11 more"),
        ({"mlp_only_layers": [0]}, r"lacks tensor model.layers.0.mlp.gate_proj.weight and 2 more"),
        ({"moe_intermediate_size": 48}, r"experts.0.gate_proj.weight has shape \(24, 32\); config.json implies \(48"),
    ):
        (source / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigurationError, match=words):
            import_hf(source, tmp_path / "out")


def without_an_expert(checkpoint: Path, expert: int) -> str:
    """Take the chunks of one expert's second projection out of a checkpoint; return the key."""
    path = checkpoint / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    key = next(key for key in metadata.state_dict_metadata if key.endswith("experts.linear_fc2.weight"))
    entry = metadata.state_dict_metadata[key]
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets[len(chunk.offsets) - 3] != expert]
    path.write_bytes(pickle.dumps(metadata))
    write_checksums(path.parent, hash_files(path.parent.iterdir()))
    return str(key)


@pytest.mark.parametrize("variant", ["top2-fp32", "mixed-fp32"])
def test_export_refuses_a_checkpoint_that_lacks_an_expert(variant: str, imported: Maker, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(imported(variant), tmp_path / "broken"))
    key = without_an_expert(broken, 5)
    place = "(5, 0, 0)" if is_mixed(variant) else "(0, 5, 0, 0)"
    with pytest.raises(ConfigurationError) as raised:
        export_hf(broken, tmp_path / "out")
    assert str(raised.value) == (
        f"{broken / 'release'}: chunks of tensor {key} hold 0 of 768 values at {place}; expected a complete checkpoint"
    )
    assert not (tmp_path / "out").exists()


def test_export_refuses_another_number_of_experts(imported: Maker, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(imported("top2-fp32"), tmp_path / "broken"))
    path = assets.assets_dir(broken) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 9}))
    with pytest.raises(
        ConfigurationError, match=r"router.weight has shape \(4, 8, 32\); hf/config.json implies \(4, 9"
    ):
        export_hf(broken, tmp_path / "out")


# Memory -----------------------------------------------------------------------------------------------------------

MIB = 2**20
SHARD = 16 * MIB
WIDTH = 512  # of model and expert: 3 x 1 MiB a expert in float32
LARGE: dict[str, Any] = SIZES | EXPERTS | {
    "model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 16, "hidden_size": WIDTH,
    "moe_intermediate_size": WIDTH, "dtype": "float32",
}  # fmt: skip
MEASURE = """
import sys
from pathlib import Path
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.import_hf import import_hf

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS:")
    call()
    return resident("VmHWM:") - before

small, large, root, shard = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
export_hf(import_hf(small, root / "small"), root / "small-out")  # what is loaded and allocated once
print(peak(lambda: import_hf(large, root / "large")))
print(peak(lambda: export_hf(root / "large", root / "large-out", max_shard_bytes=shard)))
"""


def test_memory_stays_near_one_expert_and_one_shard(hf_model: Maker, tmp_path: Path) -> None:
    """The weights are 210 MB, one layer's experts 50 MB, one stacked key 134 MB."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    source = tmp_path / "hf"
    torch.manual_seed(0)
    config = {name: value for name, value in LARGE.items() if name not in ("model_type", "dtype")}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).save_pretrained(source, max_shard_size="12MB")
    make_tokenizer().save_pretrained(source)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert 200e6 < weights < 230e6
    command = [sys.executable, "-c", MEASURE, str(hf_model("top2-fp32")), str(source), str(tmp_path), str(SHARD)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    expert = 3 * WIDTH * WIDTH * 4
    limit = 1.3 * (expert + SHARD)
    peaks = [int(line) for line in result.stdout.split()]
    assert len(peaks) == 2 and max(peaks) < limit, [f"{peak / MIB:.1f} MiB" for peak in peaks]
    assert_identical(stored(tmp_path / "large-out"), stored(source))
