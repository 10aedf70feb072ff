"""Runs that meet full disks, signals, earlier runs and each other: nothing is lost, and nothing goes wrong in silence.

What has to be found before processes meet is found by dry runs in this process; the rest runs the real entry point.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.checksums import SUMS
from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.origin import BEGUN
from megatron_camopd.errors import ConfigurationError
from tests.support.processes import command, run_ranks, torchrun
from tests.support.runs import pretrain, records
from tests.support.small_runs import LAST, STEPS, assert_as_uninterrupted, flags, refused, snapshot, told
from tests.support.worlds import World


@pytest.fixture(scope="module")
def world(small_world: World) -> World:
    return small_world


# Never anew over a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", [None, "", "7", "rel", "\0"])
def test_without_a_good_tracker_the_newest_complete_one_counts(
    tracker: str | None, world: World, run: Path, whole: Path
) -> None:
    (run / TRACKER).unlink()
    if tracker is not None:
        (run / TRACKER).write_text(tracker)
    half = Path(shutil.copytree(run / "iter_0000003", run / "iter_0000007"))
    (half / ".metadata").unlink()
    line = flags(world, run, save_retain_interval=2)
    assert run_ranks(told, 1 if tracker else 2, line)[0][:2] == (0, "")
    if not tracker:
        assert_as_uninterrupted(run, whole)


def test_records_without_checkpoints_are_left_alone(
    world: World, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in run.glob("iter_*"):
        shutil.rmtree(folder)
    for keep in (TRACKER, None):
        before = snapshot(run)
        line = refused(flags(world, run), capsys)
        assert line == (
            f"--save {run}: holds metrics.jsonl of a run whose checkpoints are gone; restore them, or name a new folder"
        )
        for status, error, _ in run_ranks(told, 1, flags(world, run)):
            assert status == 2 and line in error
        assert snapshot(run) == before
        if keep:
            (run / keep).unlink()


def stop_after(line: list[str], steps: int, rank: int, number: int) -> tuple[int, str]:
    """Train; this process gets a signal when the records hold ``steps`` steps."""
    save = Path(line[line.index("--save") + 1])

    def send() -> None:
        path = save / "metrics.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < steps:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == rank:
        threading.Thread(target=send, daemon=True).start()
    status, error, _ = told(line)
    return status, error


def begin(world: World, save: Path, **changes: Any) -> Path:
    """A run that its time limit of one step ended before any checkpoint: killed, as far as its folder tells."""
    line = flags(world, save, save_interval=None, train_iters=1, **changes)
    assert run_ranks(killed_before_saving, 1, line) == [0]
    assert (save / BEGUN).exists() and len(records(save)) == 1 and not list(save.glob("iter_*"))
    return save


def killed_before_saving(line: list[str]) -> int:
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron_camopd.stages.training_loop import TrainingLoop

    def save(*args: Any) -> None:
        raise KeyboardInterrupt

    setattr(TrainingLoop, "save", save)  # noqa: B010 - assigning to a method
    with contextlib.suppress(KeyboardInterrupt):
        pretrain(line)
    return 0


def test_a_run_killed_before_its_first_checkpoint_begins_again(world: World, whole: Path, tmp_path: Path) -> None:
    save = begin(world, tmp_path / "run")
    (save / "run.lock").write_text(json.dumps({"pid": 2**22 + 3}))
    from megatron_camopd.runtime import lock

    (save / "run.lock").write_text(json.dumps({**lock._this_process(), "pid": 2**22 + 3, "started": "5"}))
    assert run_ranks(told, 2, flags(world, save))[0][:2] == (0, "")
    assert_as_uninterrupted(save, whole)


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"recovery_steps": 2}, {"load": "teacher"}, {"general_teacher_load": "student"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_run_does_not_begin_over_it(
    change: dict[str, Any], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = begin(world, tmp_path / "run")
    before = snapshot(save)
    named = {name: world.root / value if isinstance(value, str) else value for name, value in change.items()}
    line = refused(flags(world, save, **named), capsys)
    assert str(save) in line
    assert snapshot(save) == before


EDITS: dict[str, Callable[[Path], object]] = {
    "chat_template.jinja": lambda path: path.write_text(path.read_text() + "{# edited #}"),
    "generation_config.json": lambda path: path.write_text('{"eos_token_id": [2, 0]}'),
    "tokenizer_config.json": lambda path: path.write_text(path.read_text().replace("{", "{ ", 1)),
    "tokenizer.json": lambda path: path.write_text(path.read_text() + "\n"),
}


@pytest.mark.parametrize("name", EDITS)
def test_files_of_the_model_are_part_of_the_run(
    name: str, world: World, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EDITS[name](run / "hf" / name)
    line = refused(flags(world, run), capsys)
    assert line.startswith(f"{run / 'hf' / name}: was changed since the run in --save {run} began")
    (run / "hf" / name).unlink()
    assert f"{name}: is missing since" in refused(flags(world, run), capsys)
    (run / "hf" / "added_tokens.json").write_text("{}")
    assert "added_tokens.json: is new since" in refused(flags(world, run), capsys)


# Saves that fail, signals, orphans ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_fails_is_one_line(ranks: int, world: World, run: Path, whole: Path) -> None:
    """A file may not grow beyond 60 kB, which stands for a full disk; afterwards the same command goes on."""
    before = snapshot(run)
    results = run_ranks(told, ranks, flags(world, run), 60_000)
    assert all(status == 75 for status, _, _ in results)
    error = results[0][1]
    assert error.count("\n") == 1 and f"{run / LAST}: cannot be saved (File too large)" in error
    after = snapshot(run)
    assert {name for name in after if name not in before} == set()
    assert {name for name in before if after[name] != before[name]} == {"metrics.jsonl"}
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert_as_uninterrupted(run, whole)


def train_on_a_full_disk_of_rank_1(line: list[str]) -> tuple[int, str]:
    """Train; only the second process finds the disk full."""
    status, error, _ = told(line, 60_000 if os.environ["RANK"] == "1" else None)
    return status, error


def test_a_save_that_fails_on_one_rank_ends_all(world: World, run: Path, whole: Path) -> None:
    results = run_ranks(train_on_a_full_disk_of_rank_1, 2, flags(world, run))
    assert [status for status, _ in results] == [75, 75]
    assert all(f"{run / LAST}: cannot be saved (File too large)" in error for _, error in results)
    assert not (run / LAST / SUMS).exists() and (run / TRACKER).read_text() == str(STEPS - 1)
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert_as_uninterrupted(run, whole)


def train_into_full_records(line: list[str]) -> tuple[int, str]:
    """Train; from its first record on, no file may grow beyond the size that the records have then."""
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron_camopd.stages.metrics import MetricsLog

    path = Path(line[line.index("--save") + 1]) / "metrics.jsonl"
    write = MetricsLog.write

    def limited(self: MetricsLog, record: dict[str, Any]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, resource.RLIM_INFINITY))
        write(self, record)

    setattr(MetricsLog, "write", limited)  # noqa: B010 - assigning to a method
    status, error, _ = told(line)
    return status, error


def test_records_that_cannot_be_written(world: World, run: Path, whole: Path) -> None:
    status, error = run_ranks(train_into_full_records, 1, flags(world, run))[0]
    assert status == 75 and error.count("\n") == 1
    assert f"{run / 'metrics.jsonl'}: cannot be written (File too large)" in error
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert_as_uninterrupted(run, whole)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM)])
def test_a_signal_saves_and_ends(rank: int, number: int, world: World, whole: Path, tmp_path: Path) -> None:
    """The signal reaches one process only; both save the same step, and the same command goes on from there."""
    save = tmp_path / "run"
    line = flags(world, save, save_interval=None)
    results = run_ranks(stop_after, 2, line, 1, rank, int(number))
    assert [status for status, _ in results] == [75, 75]
    saved = int((save / TRACKER).read_text())
    assert 1 <= saved < STEPS and len(records(save)) == saved
    assert f"SIGTERM: saved {saved} of {STEPS} steps to {save}; run the same command again" in results[0][1]
    assert results[1][1] == ""
    assert run_ranks(told, 2, flags(world, save))[0][:2] == (0, "")
    assert_as_uninterrupted(save, whole)


def test_two_runs_and_orphans(world: World, tmp_path: Path) -> None:
    """With torchrun itself: the second run names the first and ends; the first one's processes end with torchrun."""
    save, log, other = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    line = flags(world, save, train_iters=100_000, save_interval=50_000)
    with command(torchrun(2, line), log=log) as process:
        deadline = time.monotonic() + 120
        while not (save / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        holder = json.loads((save / "run.lock").read_text())["pid"]
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert holder in workers and len(workers) == 2
        before = (save / BEGUN).read_bytes()
        for second in (line, flags(world, save, seed=9)):
            with other.open("w") as output, contextlib.redirect_stdout(output):
                results = run_ranks(told, 1, second)
            assert results[0][0] == 2
        status, error, _ = run_ranks(told, 1, line)[0]
        assert status == 2 and f"--save {save}: process {holder} on " in error and "writes to it" in error
        assert (save / BEGUN).read_bytes() == before
        os.kill(process.pid, signal.SIGKILL)  # torchrun alone, as the out-of-memory killer would
        process.wait()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers if Path(f"/proc/{pid}").exists()):
            assert time.monotonic() < deadline, "orphans go on training"
            time.sleep(0.02)
    assert (save / "run.lock").exists()
    assert run_ranks(told, 1, flags(world, save, train_iters=2, save_interval=2))[0][:2] == (0, "")


# Odd states and folders -----------------------------------------------------------------------------------------

ODD_STATES: list[Any] = [
    {},
    {"settings": 5},
    {"settings": {}},
    {"settings": {}, "origin": []},
    {"settings": {}, "origin": {"assets": 5}},
    {"settings": {}, "origin": {"assets": {}, "student": []}, "branches": 3},
]


@pytest.mark.parametrize("state", ODD_STATES, ids=str)
@pytest.mark.parametrize("stage", ["distill", "sft"])
def test_odd_beginnings_are_one_line(
    stage: str, state: Any, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "run"
    save.mkdir()
    (save / BEGUN).write_text(json.dumps(state))
    line = refused(flags(world, save) if stage == "distill" else sft(world, save), capsys)
    assert str(save) in line


def sft(world: World, save: Path, *more: str) -> list[str]:
    rows = save.parent / "conversations.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    return [
        "--stage", "sft", "--load", str(world.student), "--save", str(save), "--conversations", str(rows),
        "--seq-length", "64", "--global-batch-size", "2", "--train-iters", "2", *more,
    ]  # fmt: skip


def test_what_an_earlier_run_left_in_hf_is_replaced(world: World, tmp_path: Path) -> None:
    """Somebody removed the checkpoints of another model's run by hand, but not hf/: the new run brings its own."""
    save = tmp_path / "run"
    shutil.copytree(world.student / "hf", save / "hf")
    template = save / "hf" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# old #}")
    (save / "hf" / "added_tokens.json").write_text("{}")
    for steps in (1, 2):
        line = flags(world, save, train_iters=steps)
        assert run_ranks(told, 1, line)[0][:2] == (0, "")
    assert snapshot(save / "hf") == snapshot(world.student / "hf")


def test_one_line_without_a_launcher(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_camopd.stages.start import run_command

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match="start the command with torchrun"):
        run_command(flags(world, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_several_processes_needs_a_launcher_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_camopd.stages.start import run_command

    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="MASTER_ADDR is not set"):
        run_command([*flags(world, tmp_path / "run"), "--dry-run"])


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_signals_that_nobody_handles(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([*flags(world, tmp_path / "run"), "--exit-signal", name], capsys)
    assert line == f"--exit-signal {name}: cannot be handled; name another signal"


def test_mistakes_that_one_process_finds_reach_all_nodes(world: World, tmp_path: Path) -> None:
    """Two torchruns as on two nodes; the rows are read by rank 0 alone, and both nodes say what is wrong with them."""
    from megatron_camopd.runtime.startup import single_process_environment

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "refuse this"}]}) + "\n")
    line = flags(world, tmp_path / "run", general_prompts=rows)
    port = single_process_environment()["MASTER_PORT"]
    logs = [tmp_path / f"node{node}.log" for node in (0, 1)]
    with contextlib.ExitStack() as stack:
        processes = []
        for node, log in enumerate(logs):
            words = torchrun(1, line)
            place = words.index("--standalone")
            words[place : place + 1] = [
                "--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port
            ]  # fmt: skip
            processes.append(stack.enter_context(command(words, log=log)))
        assert all(process.wait(150) != 0 for process in processes)
    for log in logs:
        text = log.read_text()
        assert f"--general-prompts: {rows} line 1" in text and "exitcode  : 2" in text, text[-3000:]
        assert "DistNetworkError" not in text and 'pretrain_camopd.py", line' not in text
    assert not (tmp_path / "run").exists()
