"""Records of the steps: their content, and their output to ``metrics.jsonl``, TensorBoard, W&B and the console.

The record of a step is the same on every rank. Rank 0 writes the file and the console; the rank that has Megatron's
TensorBoard or W&B writer writes to it. A resumed run drops the lines of steps after its checkpoint.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_camopd.batch import ScoredBatch
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective import importance_weights, log_prob_gap, outside_bounds
from megatron_camopd.runtime.writing import writing

FILE = "metrics.jsonl"


class Timer:
    """Timer of the phases of one step, used as ``with timer("rollout"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Any:
        """Add the seconds that the block takes to ``seconds["time_<phase>"]``."""
        start = time.perf_counter()
        yield
        # Wait for this stream only: the next teacher may still be copied in another one.
        torch.cuda.current_stream().synchronize()
        self.seconds[f"time_{phase}"] = self.seconds.get(f"time_{phase}", 0.0) + time.perf_counter() - start


class MetricsLog:
    """Writer of the records of a run.

    Args:
        directory: The run's ``--save``.
        first_step: Number of the first step of this process; lines of this step and later ones are dropped.
        writes_file: Whether this rank writes the file and the console.
        tensorboard: Megatron's TensorBoard writer, or None.
        wandb: Megatron's W&B writer, or None.
        console_line: Function that formats a record as one line for the console.
    """

    def __init__(
        self,
        directory: str,
        *,
        first_step: int,
        writes_file: bool,
        tensorboard: Any,
        wandb: Any,
        console_line: Callable[[dict[str, Any]], str],
    ) -> None:
        self._tensorboard, self._wandb, self._console_line = tensorboard, wandb, console_line
        self._file: Any = None
        if writes_file:
            path = Path(directory) / FILE
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                drop_later_steps(path, first_step)
                self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Write one step's record, a flat dictionary.

        Raises:
            SaveError: The file cannot be written, such as on a full disk.
        """
        step = record["step"]
        if self._file is not None:
            # JSON has no NaN and no infinity; null stands for them.
            finite = {name: None if _is_not_finite(value) else value for name, value in record.items()}
            with writing(self._file.name):
                self._file.write(json.dumps(finite, allow_nan=False) + "\n")
                self._file.flush()
            print(self._console_line(record), flush=True)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(f"camopd/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"camopd/{name}": value for name, value in numbers.items()}, step)

    def close(self) -> None:
        """Close the file and flush the TensorBoard writer."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # the disk is full, which writing has said
                self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.flush()


def batch_metrics(batch: ScoredBatch, importance: tuple[str, float, float], names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the rollouts and scores of one global batch, over the response tokens of all samples.

    ``gap`` is teacher minus student log-probability in nats. ``reverse_kl`` estimates E_student[log student - log
    teacher] by the negative mean gap over the student's own samples. The importance weight is student / rollout engine.
    A batch of several branches also has the gaps of each branch.

    Args:
        batch: The scored global batch.
        importance: (mode, low, high) of :func:`importance_weights`.
        names: The names of all branches, in the order of the table.
    """
    mask = batch.response_mask
    rollout = batch.rollout
    gap = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)[mask].double()
    ratio = importance_weights(batch.student_logprobs, rollout.rollout_logprobs, "clip", 0.0, float("inf"))[mask]
    weights = importance_weights(batch.student_logprobs, rollout.rollout_logprobs, *importance)[mask].double()
    lengths = rollout.response_lengths.double()
    entropies = batch.student_entropies
    return {
        "gap_mean": float(gap.mean()),
        "gap_abs_mean": float(gap.abs().mean()),
        "reverse_kl": float(-gap.mean()),
        **_gaps_by_branch(batch, names),
        **({} if entropies is None else {"entropy_mean": float(entropies[mask].double().mean())}),
        "importance_mean": float(weights.mean()),
        "importance_min": float(ratio.min()),
        "importance_max": float(ratio.max()),
        "importance_dropped_fraction": float((weights == 0).double().mean()),
        **mismatch_metrics(batch, importance),
        "response_length_mean": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "prompt_length_mean": float(rollout.prompt_lengths.double().mean()),
        "truncated_fraction": float(rollout.truncated.double().mean()),
        "tokens": int((rollout.prompt_lengths + rollout.response_lengths).sum()),
    }


def _gaps_by_branch(batch: ScoredBatch, names: Sequence[str]) -> dict[str, float]:
    """Return the gaps of each branch, or nothing if the batch has one branch; ``names``: those of all branches."""
    values: dict[str, float] = {}
    rows_by_branch = batch.rows_by_branch()
    if len(rows_by_branch) > 1:
        for branch, rows in rows_by_branch.items():
            part = batch.take(rows)
            gap = log_prob_gap(part.teacher_logprobs, part.student_logprobs)[part.response_mask].double()
            values |= {
                f"gap_mean_{names[branch]}": float(gap.mean()),
                f"gap_abs_mean_{names[branch]}": float(gap.abs().mean()),
            }
    return values


def mismatch_metrics(batch: ScoredBatch, importance: tuple[str, float, float]) -> dict[str, float]:
    """Return metrics of the mismatch between the rollout engine's policy mu and the student pi, over response tokens.

    They are mean and maximum of |log mu - log pi| in nats, the fraction of tokens whose ratio rho = pi / mu the
    importance correction changes, and the effective sample size (sum rho)^2 / (n sum rho^2) of the n tokens, which is 1
    if engine and trainer agree. The effective sample size uses the ratios before masking or clipping.
    """
    mask = batch.response_mask
    log_ratio = (batch.student_logprobs.double() - batch.rollout.rollout_logprobs.double())[mask]
    ratio = log_ratio.exp()
    outside = outside_bounds(ratio, *importance)
    squared_sum, sum_of_squares = 2 * log_ratio.logsumexp(0), (2 * log_ratio).logsumexp(0)
    return {
        "rollout_train_logprob_abs_diff": float(log_ratio.abs().mean()),
        "rollout_train_logprob_abs_diff_max": float(log_ratio.abs().max()),
        "importance_outside_fraction": float(outside.double().mean()),
        "importance_effective_fraction": float((squared_sum - sum_of_squares).exp() / len(log_ratio)),
    }


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def console_line(record: dict[str, Any]) -> str:
    """Return the record as one line for the console: branch, loss, gap, selection, and seconds of the phases."""
    skipped = "  SKIPPED: loss or gradient not finite" if record.get("skipped") else ""
    return (
        f"step {record['step']:>4} {record['branch']:<7} loss {record['loss']:>9.4f}  |gap| "
        f"{record['gap_abs_mean']:.4f}  selected {record['selected_fraction']:>4.0%}  grad {record['grad_norm']:.3f}  "
        f"len {record['response_length_mean']:.1f}  lr {record['learning_rate']:.1e}  "
        f"{seconds_of_phases(record, ('rollout', 'score', 'diagnostics', 'train', 'sync'))}{skipped}"
    )


def seconds_of_phases(record: dict[str, Any], phases: Sequence[str]) -> str:
    """Return the seconds of those ``phases`` that took place, as in ``rollout 0.06s score 0.04s``."""
    taken = [(phase, record[f"time_{phase}"]) for phase in phases if f"time_{phase}" in record]
    return " ".join(f"{phase} {time:.2f}s" for phase, time in taken if phase != "diagnostics" or time >= 0.005)


def check_record_file(save: str, name: str) -> None:
    """Check, before processes meet, that ``<save>/<name>`` can hold the records of a run.

    Raises:
        ConfigurationError: It is there and is no regular file, or cannot be read and written.
    """
    path = Path(save) / name
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path}: is no regular file; move it away, or give another --save")
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise ConfigurationError(f"{path}: cannot be read and written; change its permissions, or give another --save")


def drop_later_steps(path: Path, first_step: int) -> None:
    """Drop lines of a JSONL file whose ``step`` is ``first_step`` or later, and a last line that a crash cut short.

    Other lines that are no records are dropped too, and counted on the console. A link is followed.
    """
    if not path.is_file():
        return
    path = path.resolve()
    *lines, last = path.read_bytes().split(b"\n")
    kept, broken = [], 0
    for line in filter(bytes.strip, lines):
        step = _step_of(line)
        broken += step is None
        if step is not None and step < first_step:
            kept.append(line)
    if (step := _step_of(last)) is not None and step < first_step:  # complete but for its line end
        kept.append(last)
    if broken:
        print(f"{path}: {broken} lines are no records of a step; dropped", flush=True)
    if kept == lines and not last:
        return
    partial = path.with_suffix(".jsonl.partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    os.replace(partial, path)


def _step_of(line: bytes) -> int | None:
    """Return the number of the step of a record, or None if ``line`` is no record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
