"""Runs of the real command: their flags, records and checkpoints."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_camopd.checkpoint.torch_dist import TorchDistReader


def records(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def without_costs(record: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory differ from run to run."""
    return {name: value for name, value in record.items() if not name.startswith(("time_", "peak_memory"))}


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of one checkpoint, model and optimizer."""
    reader = TorchDistReader(folder)
    return {key: reader.read(key, (0,) * len(shape), shape) for key, shape in reader.shapes.items()}


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    tensors, wanted = stored(found), stored(expected)
    assert tensors.keys() == wanted.keys()
    assert any("exp_avg_sq" in key for key in wanted) and any(key.startswith("decoder.") for key in wanted)
    different = [key for key in wanted if not torch.equal(tensors[key], wanted[key])]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ: {different[:5]}"


def pretrain(line: list[str]) -> int:
    """The entry point on one of ``run_ranks``' processes; its exit status."""
    import pretrain_camopd

    sys.argv = ["pretrain_camopd.py", *line]
    return pretrain_camopd.main()
