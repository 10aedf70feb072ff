"""A step's record: numbers against plain float64 loops, the file after a crash, the line on the console."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.stages.metrics import FILE, MetricsLog, Timer, batch_metrics, console_line, mismatch_metrics

LENGTHS = [(3, 4), (2, 1), (6, 2)]  # prompt, response
RECORD: dict[str, Any] = {
    "step": 7, "branch": "general", "loss": 1.25, "grad_norm": 0.5, "learning_rate": 2e-6, "skipped": 0,
    "selected_fraction": 0.75, "gap_abs_mean": 0.125, "response_length_mean": 12.5, "time_rollout": 1.5,
    "time_train": 2.25,
}  # fmt: skip


class Recorder:
    """Stands in for a TensorBoard or W&B writer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((values, step))

    def flush(self) -> None:
        self.calls.append(("flush",))


def scored() -> ScoredBatch:
    """Random scores; what lies beyond a response is rubbish that no number may notice."""
    generator = torch.Generator().manual_seed(3)
    teacher, student, rollout = -3.0 * torch.rand(3, len(LENGTHS), 6, generator=generator)
    return ScoredBatch(
        rollout=RolloutBatch(
            indices=torch.arange(len(LENGTHS)),
            tokens=torch.zeros(len(LENGTHS), 9, dtype=torch.int64),
            prompt_lengths=torch.tensor([prompt for prompt, _ in LENGTHS]),
            response_lengths=torch.tensor([response for _, response in LENGTHS]),
            rollout_logprobs=rollout,
            truncated=torch.tensor([False, True, False]),
        ),
        branches=torch.zeros(len(LENGTHS), dtype=torch.int64),
        teacher_logprobs=teacher,
        student_logprobs=student,
    )


def by_loops(batch: ScoredBatch, mode: str, low: float, high: float) -> dict[str, float]:
    """The same numbers from the definitions, one token at a time."""
    gaps, ratios, weights, differences = [], [], [], []
    for row, (_, response) in enumerate(LENGTHS):
        for column in range(response):
            teacher = float(batch.teacher_logprobs[row, column])
            student = float(batch.student_logprobs[row, column])
            rollout = float(batch.rollout.rollout_logprobs[row, column])
            ratio = math.exp(student - rollout)
            gaps.append(teacher - student)
            differences.append(abs(student - rollout))
            ratios.append(ratio)
            masked = ratio if low <= ratio <= high else 0.0
            weights.append({"mask": masked, "clip": min(ratio, high), "none": 1.0}[mode])
    tokens = len(gaps)
    outside = {
        "mask": lambda ratio: not low <= ratio <= high, "clip": lambda ratio: ratio > high, "none": lambda ratio: False,
    }[mode]  # fmt: skip
    return {
        "gap_mean": sum(gaps) / tokens,
        "gap_abs_mean": sum(map(abs, gaps)) / tokens,
        "reverse_kl": -sum(gaps) / tokens,
        "importance_mean": sum(weights) / tokens,
        "importance_min": min(ratios),
        "importance_max": max(ratios),
        "importance_dropped_fraction": weights.count(0.0) / tokens,
        "rollout_train_logprob_abs_diff": sum(differences) / tokens,
        "rollout_train_logprob_abs_diff_max": max(differences),
        "importance_outside_fraction": sum(map(outside, ratios)) / tokens,
        "importance_effective_fraction": sum(ratios) ** 2 / (tokens * sum(ratio**2 for ratio in ratios)),
        "response_length_mean": 7 / 3,
        "response_length_max": 4,
        "prompt_length_mean": 11 / 3,
        "truncated_fraction": 1 / 3,
        "tokens": 18,
    }


@pytest.mark.parametrize("importance", [("mask", 0.5, 2.0), ("clip", 0.0, 2.0), ("none", 0.5, 5.0)])
def test_batch_metrics_match_plain_loops(importance: tuple[str, float, float]) -> None:
    expected = by_loops(scored(), *importance)
    if importance[0] == "mask":
        assert 0 < expected["importance_dropped_fraction"] < 1
    assert batch_metrics(scored(), importance, ["general"]) == pytest.approx(expected, rel=1e-6)


def test_effective_samples_survive_huge_ratios() -> None:
    """One token the engine thought impossible: a single effective sample, not a number that overflowed."""
    batch = scored()
    batch.rollout.rollout_logprobs[0, 0] = -2000.0
    found = mismatch_metrics(batch, ("mask", 0.5, 2.0))
    assert found["importance_effective_fraction"] == pytest.approx(1 / 7)
    assert found["rollout_train_logprob_abs_diff_max"] == pytest.approx(2000.0, abs=3.0)
    batch.rollout.rollout_logprobs.copy_(batch.student_logprobs)
    agreeing = dict.fromkeys(found, 0.0) | {"importance_effective_fraction": pytest.approx(1.0)}
    assert mismatch_metrics(batch, ("mask", 0.5, 2.0)) == agreeing


def open_log(directory: Path, **changes: Any) -> MetricsLog:
    settings = {"first_step": 0, "writes_file": True, "tensorboard": None, "wandb": None, "console_line": console_line}
    return MetricsLog(str(directory), **(settings | changes))


def test_records_go_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board, wandb = Recorder(), Recorder()
    log = MetricsLog(
        str(tmp_path / "run"), first_step=0, writes_file=True, tensorboard=board, wandb=wandb, console_line=console_line
    )
    log.write(RECORD)
    assert json.loads((tmp_path / "run" / FILE).read_text()) == RECORD  # before it is closed
    log.close()
    numbers = {f"camopd/{name}": value for name, value in RECORD.items() if name != "branch"}
    assert board.calls == [*((name, value, 7) for name, value in numbers.items()), ("flush",)]
    assert wandb.calls == [(numbers, 7)]
    assert capsys.readouterr().out == console_line(RECORD) + "\n"


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(
        str(tmp_path / "run"), first_step=0, writes_file=False, tensorboard=None, wandb=None, console_line=console_line
    )
    log.write(RECORD)
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"st', "\x00\x00", "null", '{"loss": 1.0}'])
@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_resumed_run_cuts_the_file_back(torn: str, first_step: int, kept: list[int], tmp_path: Path) -> None:
    path = tmp_path / FILE
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in range(4)]
    path.write_text("\n".join([*lines, torn]))
    log = MetricsLog(
        str(tmp_path), first_step=first_step, writes_file=True, tensorboard=None, wandb=None, console_line=console_line
    )
    assert path.read_text().splitlines() == lines[: len(kept)]
    log.write(RECORD | {"step": first_step})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, first_step]
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE]


def test_console_line() -> None:
    line = console_line(RECORD)
    for part in ("step    7 general", "loss    1.2500", "|gap| 0.1250", "selected  75%", "grad 0.500", "len 12.5",
                 "lr 2.0e-06", "rollout 1.50s train 2.25s"):  # fmt: skip
        assert part in line
    assert "\n" not in line and "SKIPPED" not in line
    nan = console_line(RECORD | {"skipped": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert nan.endswith("SKIPPED: loss or gradient not finite") and "nan" in nan and "inf" in nan


def test_timer_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.5, 20.0, 20.25, 30.0, 30.5])
    monkeypatch.setattr("megatron_camopd.stages.metrics.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = Timer()
    for phase in ("train", "sync", "train"):
        with timer(phase):
            pass
    assert timer.seconds == {"time_train": 2.0, "time_sync": 0.25}
