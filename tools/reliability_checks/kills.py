"""Kills of a training run at chosen and at random moments, and the comparison with the same run left alone.

A round starts a run in a new folder and ends it again and again; after each end the same command is started once more,
until the run is complete. Then its records and checkpoints must be those of the uninterrupted run, bit for bit.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_camopd.checkpoint.checksums import SUMS, damaged_files
from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from megatron_camopd.config.program import cleaned_up

ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.0005
_END_LIMIT = 90.0

MOMENTS = ("any", "lock", "begun", "step", "folder", "index", "checksums", "tracker")
"""When a run is ended: at a random time, or when a file appears or changes that is written at this moment."""
WAYS = ("all", "one", "launcher", "term")
"""How: SIGKILL for all processes, for one of them, or for torchrun alone; SIGTERM for torchrun."""


@dataclass(frozen=True)
class Job:
    """A training run to be ended and resumed.

    Attributes:
        name: Name of the layout, for the table.
        processes: Number of processes.
        flags: Flags of ``pretrain_camopd.py`` without ``--save``.
    """

    name: str
    processes: int
    flags: tuple[str, ...]

    def command(self, save: Path) -> list[str]:
        """Return the command line that runs the job into ``save``."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [
            *launcher, "--nproc-per-node", str(self.processes), str(ROOT / "pretrain_camopd.py"), *self.flags,
            "--save", str(save),
        ]  # fmt: skip


@dataclass
class Result:
    """Outcome of the kills of one job.

    Attributes:
        kills: Number of ends by moment and way.
        rounds: Number of runs that were completed and compared.
        differences: What differed from the uninterrupted run, or went wrong otherwise.
    """

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    rounds: int = 0
    differences: list[str] = field(default_factory=list)


def run_kills(job: Job, count: int, work: Path, *, seed: int, moments: Sequence[str], bar: "tqdm[Any]") -> Result:
    """End runs of ``job`` ``count`` times and compare each run with one that was left alone.

    Args:
        job: The job.
        count: Number of ends.
        work: Folder for the runs.
        seed: Seed of moments and ways.
        moments: Some of :data:`MOMENTS`.
        bar: Progress bar, advanced by each end.
    """
    chosen, result = random.Random(f"{job.name} {seed}"), Result()
    whole = work / "whole"
    began = time.monotonic()
    status, text = _finish(job, whole, work / "whole.log")
    duration = time.monotonic() - began
    if status != 0:
        raise RuntimeError(f"{job.name}: the run that was left alone ended with status {status}: {text[-2000:]}")
    while result.kills.total() < count:
        save, log = work / f"round-{result.rounds}", work / f"round-{result.rounds}.log"
        wanted = min(chosen.randint(3, 8), count - result.kills.total())
        for _ in range(wanted):
            moment, way = chosen.choice(moments), chosen.choice(WAYS)
            if not _end_once(job, save, log, moment, way, chosen, duration):
                break  # complete before the moment came
            result.kills[moment, way] += 1
            bar.update(1)
        status, text = _finish(job, save, log)
        problems = [f"status {status}: {text[-800:]}"] if status != 0 else list(differences(save, whole))
        result.differences += [f"{job.name} {save.name}: {problem}" for problem in problems]
        result.rounds += 1
        if not problems:
            shutil.rmtree(save)
    return result


def _finish(job: Job, save: Path, log: Path) -> tuple[int, str]:
    """Run the job to its end and return its status and what it printed."""
    with _started(job, save, log) as process:
        status = process.wait(600)
    return status, log.read_text(errors="replace")


@contextlib.contextmanager
def _started(job: Job, save: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            job.command(save),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end() -> None:
        if process.poll() is None:
            for pid in [*workers_of(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    with cleaned_up(end):
        yield process


def workers_of(pid: int) -> list[int]:
    """Return the ids of the child processes of ``pid``."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _end_once(job: Job, save: Path, log: Path, moment: str, way: str, chosen: random.Random, duration: float) -> bool:
    """Start the job and end it at ``moment``; False if it was complete before."""
    reached = _detector(save, moment)
    delay = chosen.uniform(0, 1.1 * duration) if moment == "any" else chosen.choice((0, 0, 0.001, 0.01, 0.1))
    deadline = time.monotonic() + (delay if moment == "any" else 4 * duration + 60)
    with _started(job, save, log) as process:
        while process.poll() is None and time.monotonic() < deadline and not reached():
            time.sleep(_POLL)
        if moment != "any":
            time.sleep(delay)
        if process.poll() is not None:
            return False
        workers = workers_of(process.pid)
        targets = {"all": [*workers, process.pid], "one": workers[:1] or [process.pid]}.get(way, [process.pid])
        if way == "one" and workers:
            targets = [chosen.choice(workers)]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if way == "term" else signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_LIMIT)
        deadline = time.monotonic() + _END_LIMIT
        while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.01)
        return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _detector(save: Path, moment: str) -> Callable[[], bool]:
    """Return a function that tells whether ``moment`` has come since now."""
    looks: dict[str, Callable[[], object]] = {
        "any": lambda: None,
        "lock": lambda: sorted(path.name for path in _entries(save) if path.name.startswith("run.lock")),
        "begun": lambda: [path.name for path in _entries(save) if "begun.json" in path.name],
        "step": lambda: _size(save / "metrics.jsonl"),
        "folder": lambda: sorted(path.name for path in _entries(save) if path.name.startswith("iter_")),
        "index": lambda: sorted(str(path) for path in save.glob("iter_*/.metadata*")),
        "checksums": lambda: sorted(str(path) for path in save.glob(f"iter_*/*{SUMS}*")),
        "tracker": lambda: _text(save / TRACKER),
    }
    look = looks[moment]
    before = look()
    return lambda: look() != before


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def differences(save: Path, whole: Path) -> Iterator[str]:
    """Yield what differs between a run and the same run left alone: records, checkpoints, files left behind."""
    found, expected = _records(save), _records(whole)
    if found != expected:
        steps = [record.get("step") for record in found]
        yield f"metrics.jsonl: {len(found)} records {steps[:3]}..{steps[-3:]}, of {len(expected)}, or other values"
    names = {path.name for path in whole.glob("iter_*")}
    for name in sorted(names & {path.name for path in save.glob("iter_*")}):
        yield from (f"{name}: {key} differs" for key in _different_tensors(save / name, whole / name))
        yield from damaged_files([save / name]).values()
    last = f"iter_{int(_text(whole / TRACKER)):07d}"
    if _text(save / TRACKER) != _text(whole / TRACKER) or not (save / last / SUMS).exists():
        yield f"{TRACKER} names {_text(save / TRACKER)!r}, or {last} has no {SUMS}"
    left = [
        path.name for path in save.iterdir() if "lock" in path.name or "partial" in path.name or "begun" in path.name
    ]
    if left:
        yield f"left behind: {', '.join(left)}"


def _records(save: Path) -> list[dict[str, Any]]:
    """Return the records of a run without what differs from run to run: seconds and memory."""
    lines = _text(save / "metrics.jsonl").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(("time_", "peak_memory"))}
        for line in lines
    ]


def _different_tensors(found: Path, expected: Path) -> list[str]:
    readers = TorchDistReader(found), TorchDistReader(expected)
    if readers[0].shapes != readers[1].shapes:
        return ["the list of tensors"]
    return [
        key
        for key, shape in readers[1].shapes.items()
        if not torch.equal(*(reader.read(key, (0,) * len(shape), shape) for reader in readers))
    ]


def table(results: Sequence[tuple[Job, Result]]) -> list[str]:
    """Return the lines of a Markdown table: ends by layout and way, and by layout and moment."""
    lines = []
    for names, place in ((WAYS, 1), (MOMENTS, 0)):
        lines += [f"| layout | {' | '.join(names)} | ends | rounds | differences |", "|---" * (len(names) + 4) + "|"]
        for job, result in results:
            numbers = [sum(n for kind, n in result.kills.items() if kind[place] == name) for name in names]
            cells = [*numbers, result.kills.total(), result.rounds, len(result.differences)]
            lines.append(f"| {job.name} | {' | '.join(map(str, cells))} |")
        lines.append("")
    return lines[:-1]
