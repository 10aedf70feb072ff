"""The benchmark of the training pass: what it calls, and how its table counts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import ROOT, run_command
from tools import benchmark_training as benchmark


def test_calls_take_turns_and_the_first_round_is_not_timed() -> None:
    called: list[str] = []
    times = benchmark.rounds({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2)
    assert called == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_the_batch_is_one_that_is_scored_alike_every_time() -> None:
    batch, again = (benchmark.synthetic_batch(4, 3, 5, 100) for _ in range(2))
    assert batch.rollout.tokens.shape == (4, 8) and batch.response_mask.all()
    assert int(batch.rollout.tokens.max()) < 100
    assert torch.equal(batch.teacher_logprobs, again.teacher_logprobs)
    assert torch.equal(batch.student_logprobs, batch.rollout.rollout_logprobs)
    assert not torch.equal(batch.student_logprobs, batch.teacher_logprobs)


def test_ratios_are_of_medians() -> None:
    document: dict[str, Any] = {
        "command": "x", "date": "d", "commit": "c", "hardware": "h", "versions": {"python": "3"},
        "workload": {"samples": 4, "prompt_length": 3, "response_length": 5, "micro_batch_size": 2, "preset": "tiny",
                     "diagnosed": 2},
        "seconds": {"100%": [2.0, 4.0, 9.0], "25%": [0.5, 1.2, 1.0], "diagnostics off": [0.0, 0.0, 0.0]},
    }  # fmt: skip
    lines = [[cell.strip() for cell in line.split("|")] for line in benchmark.tables(document).splitlines()]
    assert ["", "training pass, 25% of the samples", "1.00000", "0.50000", "25.000%", ""] in lines
    assert ["", "diagnostics off", "0.00000", "0.00000", "0.000%", ""] in lines


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        (["benchmark_training.py", "--samples", "4", "--diagnosed", "2", "--response-length", "8"], "100%"),
        (["benchmark_checkpoint.py", "--preset", "tiny"], "save with checksums"),
    ],
    ids=["training", "checkpoint"],
)
def test_the_whole_measurement(words: list[str], measured: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / words[0]), *words[1:], "--repeats", "1"]
    files = ["--json", str(tmp_path / "x.json"), "--markdown", str(tmp_path / "x.md")]
    log = tmp_path / "log"
    assert run_command([*command, *files], log=log) == 0, log.read_text()[-3000:]
    document = json.loads((tmp_path / "x.json").read_text())
    assert len(document["seconds"][measured]) == 1 and document["seconds"][measured][0] > 0
    assert measured in (tmp_path / "x.md").read_text()
