"""Staged folders: nothing is left by an error, a signal or a full disk, nor by a process that was killed outright."""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.import_hf import import_hf
from megatron_camopd.checkpoint.staging import staged_folder
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import World

ROOT = Path(__file__).parents[3]
PROGRAM = """
import signal, sys, time
from pathlib import Path
from megatron_camopd.checkpoint.staging import staged_folder
from megatron_camopd.config.program import run_program, stop_on_signals

def work():
    with staged_folder(Path(sys.argv[1]), flag="--save") as staged:
        (staged / "weights").write_text("half")
        print("ready", flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass  # as some libraries do

for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # nohup, say, has these tests ignore some
    signal.signal(number, signal.SIG_DFL)
stop_on_signals("tool.py")
sys.exit(run_program("tool.py", work))
"""


@contextmanager
def staging(target: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has begun to write ``target`` and is waiting."""
    command = [sys.executable, "-c", PROGRAM, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("target", ["target", "new/folders/target"])
def test_a_signal_leaves_nothing(number: signal.Signals, status: int, target: str, tmp_path: Path) -> None:
    with staging(tmp_path / target) as process:
        assert len(list(tmp_path.rglob("weights"))) == 1
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (status, "", f"tool.py: stopped by {number.name}\n")
    assert list(tmp_path.iterdir()) == []


def test_the_next_conversion_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    with staging(tmp_path / "target") as living, staging(tmp_path / "target") as killed:
        killed.kill()
        killed.communicate(timeout=60)
        mine = f".target.partial-{killed.pid}"
        (tmp_path / mine).mkdir()  # as earlier versions called it
        elsewhere = f".target.partial-{killed.pid}@another-machine"
        others = {elsewhere, f".other.partial-{killed.pid}", ".target.partial-x", f".target.partial-{killed.pid}.json"}
        for name in others:
            (tmp_path / name).mkdir()
        with staged_folder(tmp_path / "target", flag="--save") as staged:
            (staged / "a").touch()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == others | {"target", f".target.partial-{living.pid}@{socket.gethostname()}"}
        assert [path.name for path in (tmp_path / "target").iterdir()] == ["a"]


def test_a_process_that_waits_for_its_parent_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its status
    (tmp_path / f".target.partial-{process.pid}").mkdir()
    with staged_folder(tmp_path / "target", flag="--save"):
        pass
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_error_removes_the_folders_it_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for target in ("a/b/c", "there/b/c", "there/c"):
        with (
            pytest.raises(ConfigurationError, match="--save .*: cannot be written .No space left on device.; expected"),
            staged_folder(tmp_path / target, flag="--save") as staged,
        ):
            (staged / "x").touch()
            raise OSError(28, "No space left on device")
        assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with staged_folder(tmp_path / "a/b/c", flag="--save") as staged:
        (staged / "x").touch()
    assert (tmp_path / "a/b/c/x").exists()


def test_targets_that_are_no_folders(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, words in (("fifo", "is not a folder"), ("fifo/below", "cannot be written"), ("n" * 250, "too long")):
        with (
            pytest.raises(ConfigurationError, match=f"--save {tmp_path / name}: .*{words}"),
            staged_folder(tmp_path / name, flag="--save"),
        ):
            raise AssertionError("must not be entered")


@pytest.mark.parametrize("kilobytes", [1, 20, 60, 100])
def test_a_full_disk_is_one_line(kilobytes: int, world: World, tmp_path: Path) -> None:
    """A limit on the size of files stands for it; both fail a write half-way."""
    source = world.student.with_name("student-hf")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, convert in enumerate((lambda: import_hf(source, tmp_path / "new" / "target"),
                                      lambda: export_hf(world.student, tmp_path / "new" / "target"))):  # fmt: skip
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, before[1]))
        try:
            with pytest.raises(ConfigurationError, match="cannot be written .File too large.; expected") as caught:
                convert()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == [], number
