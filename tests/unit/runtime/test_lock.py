"""Locks: a living holder keeps others out, wherever it runs; a dead one blocks nobody."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import lock
from megatron_camopd.runtime.lock import locked, lost_lock

ELSEWHERE = {"boot": "another machine", "host": "node-7", "pid": 41, "started": "12", "since": "yesterday"}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def holder(path: Path, **record: Any) -> dict[str, Any]:
    """Write a lock as another process would have written it."""
    content = {**lock._this_process(), "since": "2026-01-01T00:00:00+00:00", "token": "other"} | record
    path.write_text(json.dumps(content))
    return content


def refusal(path: Path, patience: float = 1.0) -> str:
    with pytest.raises(ConfigurationError) as caught, locked(path, "--save x", patience=patience):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_lock_is_there_for_the_block_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "run.lock"
    with locked(path, "--save x"):
        record = json.loads(path.read_text())
        assert record["pid"] == os.getpid() and record["host"] and record["since"] and lost_lock() is None
    assert not (tmp_path / "new").exists()  # a run that wrote nothing leaves nothing
    with locked(path, "--save x"):
        (path.parent / "metrics.jsonl").touch()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["metrics.jsonl"]


def test_a_living_process_of_this_machine_keeps_others_out(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "run.lock"
    holder(path, pid=sleeper.pid, started=lock._started(sleeper.pid), host="here")
    before = path.read_bytes()
    assert refusal(path) == (
        f"--save x: process {sleeper.pid} on here (since 2026-01-01T00:00:00+00:00) writes to it; wait for its end, or "
        "name another place"
    )
    assert path.read_bytes() == before


def test_dead_holders_block_nobody(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    started = lock._started(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    dead: dict[str, dict[str, Any]] = {
        "killed": {"pid": sleeper.pid, "started": started},
        "another process has its id": {"pid": os.getpid(), "started": "1"},
        "never was one": {"pid": 2**22 + 5, "started": "17"},
        "odd": {"pid": "41", "started": None},
    }
    for name, record in dead.items():
        path = tmp_path / name / "run.lock"
        path.parent.mkdir()
        holder(path, **record)
        began = time.monotonic()
        with locked(path, "--save x"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert time.monotonic() - began < 5, name  # it is looked up, not waited for
        assert not list(path.parent.iterdir())


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    started = lock._started(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    holder(tmp_path / "run.lock", pid=process.pid, started=started)
    with locked(tmp_path / "run.lock", "--save x"):
        pass
    process.wait()


@pytest.mark.parametrize("content", [json.dumps(ELSEWHERE), "", "{", "[1, 2]", "\x00\x00", json.dumps({"pid": {}})])
def test_holders_elsewhere_are_watched(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    assert "writes to it" in refusal(path)
    stopped.set()
    thread.join()
    assert path.read_text() == content
    with locked(path, "--save x", patience=0.5):  # no sign of life any more
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """A process that is killed while it takes the lock leaves a file of its own beside it."""
    for name in ("run.lock.0123456789abcdef", "run.lock.fedcba9876543210"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "run.lockfile").touch()
    with locked(tmp_path / "run.lock", "--save x"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock", "run.lockfile"]


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    path = tmp_path / "run.lock"
    with locked(path, "--save x"):
        touched = [lock._touched(path)]
        deadline = time.monotonic() + 20
        while len(set(touched)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
            touched.append(lock._touched(path))
        assert len(set(touched)) >= 3


def test_a_lost_lock_is_noticed_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path, "--save x"):
        holder(path, **ELSEWHERE)
        problem = lost_lock()
        assert problem is not None and problem.startswith("--save x: run.lock is no longer this run's")
        assert "now process 41 on node-7" in problem
    assert path.exists()
    assert lost_lock() is None


def test_a_lock_that_somebody_removed_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PAUSE", 0.01)
    path = tmp_path / "run.lock"
    with locked(path, "--save x"):
        path.unlink()
        assert lost_lock() is None and json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_read_error_that_passes_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PAUSE", 0.01)
    path = tmp_path / "run.lock"
    answers: list[dict[str, Any]] = [{}, {}, {}]
    with locked(path, "--save x"):
        read = lock._read
        monkeypatch.setattr(lock, "_read", lambda path: answers.pop() if answers else read(path))
        assert lost_lock() is None
        answers += [{} for _ in range(100)]
        problem = lost_lock()
        assert problem is not None and "it cannot be read" in problem
        answers.clear()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_lock_that_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert refusal(path) == f"--save x: {path} is no regular file; remove it, or name another place"


def test_a_machine_without_identity_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc tells no boot, process ids say nothing about who wrote the lock."""
    here = lock._this_process()
    monkeypatch.setattr(lock, "_this_process", lambda: here | {"boot": ""})
    path = tmp_path / "run.lock"
    holder(path, boot="", pid=2**22 + 5, started="17")
    began = time.monotonic()
    with locked(path, "--save x", patience=1.0):
        assert time.monotonic() - began > 0.9


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_without_hard_links(error: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Any, target: Any) -> None:
        raise error(1, "not supported")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "run.lock"
    with locked(path, "--save x"):
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.lock"]
        assert json.loads(path.read_text())["pid"] == os.getpid() and "writes to it" in refusal(path)


def test_a_link_whose_answer_got_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may ask twice for the same link, and report that it exists."""
    link = os.link

    def twice(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    with locked(tmp_path / "run.lock", "--save x"):
        assert lost_lock() is None


def test_a_holder_that_cleared_up_beside_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process took the lock, and removed this one's file, between this one's two steps."""

    def link(source: Any, target: Any) -> None:
        Path(source).unlink()
        raise FileExistsError(17, "exists")

    path = tmp_path / "run.lock"
    with locked(path, "--save x"):
        monkeypatch.setattr(os, "link", link)
        assert "writes to it" in refusal(path)


def contend(path: str, start: Any, results: Any, end: Any) -> None:
    start.wait()
    try:
        with locked(Path(path), "--save x"):
            results.put("held")
            end.wait(60)
    except ConfigurationError:
        results.put("refused")


@pytest.mark.parametrize("dead_lock", [False, True])
def test_one_of_many_wins(dead_lock: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    if dead_lock:
        holder(path, pid=2**22 + 5, started="17")
    context = multiprocessing.get_context("forkserver")
    start, results, end = context.Event(), context.Queue(), context.Event()
    processes = [context.Process(target=contend, args=(str(path), start, results, end)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    end.set()
    for process in processes:
        process.join(60)
    assert found.count("held") <= 1 and found.count("refused") >= 5
    assert found.count("held") == 1 or dead_lock  # two that clear a dead lock away at once may both step back
    assert not path.exists() and not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refusal(tmp_path / "file" / "run" / "run.lock")
    assert line.startswith("--save x: ") and "cannot be written (Not a directory)" in line
