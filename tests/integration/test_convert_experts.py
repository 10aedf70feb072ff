"""Conversion of models with experts: bit-exact, the logits of transformers, little memory, strict about its input.

A model of two kinds of layers (``mixed``) has other keys in a checkpoint than one whose layers are equal.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_camopd.checkpoint import assets
from megatron_camopd.checkpoint.checksums import hash_files, write_checksums
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.import_hf import import_hf
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from megatron_camopd.errors import ConfigurationError
from tests.support.expert_models import VARIANTS, Models, assert_identical, is_mixed, stored
from tests.support.processes import ROOT, run_ranks
from tests.support.worlds import EXPERTS, SIZES, make_hf_model, make_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


# Both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_exact(variant: str, models: Models, tmp_path: Path) -> None:
    source = models.folder(variant)
    assert len(list(source.glob("*.safetensors"))) > 1
    exported = export_hf(models.checkpoint(variant), tmp_path / "out", max_shard_bytes=40_000)
    assert_identical(stored(exported), stored(source))
    assert len(list(exported.glob("*.safetensors"))) > 1
    assert (exported / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("variant", ["top2-fp32", "mixed-fp32"])
def test_checkpoint_keys_hold_the_rows_of_their_expert(variant: str, models: Models) -> None:
    reader, tensors = TorchDistReader(models.checkpoint(variant) / "release"), stored(models.folder(variant))
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
def test_logits_are_those_of_transformers(variant: str, models: Models) -> None:
    (difference,) = run_ranks(logit_difference, 1, str(models.folder(variant)), str(models.checkpoint(variant)))
    assert difference < 2e-5


def test_logits_of_a_dense_model_are_those_of_transformers(tmp_path: Path) -> None:
    source = make_hf_model(tmp_path / "hf")
    (difference,) = run_ranks(logit_difference, 1, str(source), str(import_hf(source, tmp_path / "megatron")))
    assert difference < 2e-5


def test_probabilities_that_are_normalised_otherwise_are_noticed(models: Models, tmp_path: Path) -> None:
    other = Path(shutil.copytree(models.folder("top2-fp32"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    with pytest.raises(AssertionError, match="its logits differ from those of .*; convert again"):
        run_ranks(logit_difference, 1, str(other), str(models.checkpoint("top2-fp32")))


def test_the_command_verifies(models: Models, tmp_path: Path) -> None:
    script = ROOT / "checkpoints_convert" / "hf_to_megatron.py"
    flags = ["--hf-path", str(models.folder("mixed-fp32")), "--save", str(tmp_path / "out"), "--verify"]
    result = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("verify: largest logit difference"))
    assert float(line.split()[-1]) < 2e-5


# Refusals ---------------------------------------------------------------------------------------------------------


def drop_tensor(folder: Path, name: str) -> None:
    from safetensors.torch import save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"].pop(name)
    with safe_open(path, framework="pt") as file:
        save_file({key: file.get_tensor(key) for key in file.keys() if key != name}, path)  # noqa: SIM118
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_expert_tensor_is_named(part: str, models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models.folder("mixed-fp32"), tmp_path / "hf"))
    name = f"model.layers.3.mlp.experts.6.{part}.weight"
    drop_tensor(source, name)
    with pytest.raises(ConfigurationError) as raised:
        import_hf(source, tmp_path / "out")
    assert str(raised.value) == f"{source}: lacks tensor {name}; config.json implies it"
    assert not (tmp_path / "out").exists()


def test_experts_that_the_config_does_not_have_are_named(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models.folder("top2-fp32"), tmp_path / "hf"))
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
def test_export_refuses_a_checkpoint_that_lacks_an_expert(variant: str, models: Models, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(models.checkpoint(variant), tmp_path / "broken"))
    key = without_an_expert(broken, 5)
    place = "(5, 0, 0)" if is_mixed(variant) else "(0, 5, 0, 0)"
    with pytest.raises(ConfigurationError) as raised:
        export_hf(broken, tmp_path / "out")
    assert str(raised.value) == (
        f"{broken / 'release'}: chunks of tensor {key} hold 0 of 768 values at {place}; expected a complete checkpoint"
    )
    assert not (tmp_path / "out").exists()


def test_export_refuses_another_number_of_experts(models: Models, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(models.checkpoint("top2-fp32"), tmp_path / "broken"))
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


def test_memory_stays_near_one_expert_and_one_shard(models: Models, tmp_path: Path) -> None:
    """The weights are 210 MB, one layer's experts 50 MB, one stacked key 134 MB."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    source = tmp_path / "hf"
    torch.manual_seed(0)
    config = {name: value for name, value in LARGE.items() if name not in ("model_type", "dtype")}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).save_pretrained(source, max_shard_size="12MB")
    make_tokenizer().save_pretrained(source)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert 200e6 < weights < 230e6
    # Freed tensors go back to the system at once: else the peak depends on what the allocator keeps, by up to 17 MiB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(models.folder("top2-fp32")), str(source), str(tmp_path), str(SHARD)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    expert = 3 * WIDTH * WIDTH * 4
    limit = 1.3 * (expert + SHARD)
    peaks = [int(line) for line in result.stdout.split()]
    assert len(peaks) == 2 and max(peaks) < limit, [f"{peak / MIB:.1f} MiB" for peak in peaks]
    assert_identical(stored(tmp_path / "large-out"), stored(source))
