"""Requests to stop: noted, given time, and ended where nothing goes on; and the death of the launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_camopd.runtime.signals import stop_requests

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_request_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests(signal.SIGTERM, number) as request:
        assert request.name is None
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        assert request.name == number.name
        os.kill(os.getpid(), number)
        request.begin("step")
    assert signal.getsignal(number) is before


PHASES = """
import ctypes, os, sys, signal, time
from megatron_camopd.runtime import signals
signals._FIRST_PATIENCE, signals._LEAST_PATIENCE = 3.0, 0.5
with signals.stop_requests(signal.SIGTERM) as request:
    for phase, seconds, signalled in eval(sys.argv[1]):
        request.begin(phase)
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        if seconds == "stuck":  # in a library that does not return to Python, like a collective without its peer
            library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)
        time.sleep(seconds)
print("ended", flush=True)
"""
STEP = ("step", 0.01, False)


@pytest.mark.parametrize(
    ("phases", "waited"),
    [
        ([("step", "stuck", True)], 3),  # the first of its kind has all the time
        ([STEP, STEP, ("step", "stuck", True)], 1),  # later ones little more than those before
        ([STEP, ("save", 0.01, False), STEP, ("save", "stuck", True)], 1),
        ([STEP, STEP, ("save", 1.5, True)], None),  # a save is not judged by steps
        ([("step", 0.5, False), ("step", 1.2, True)], None),
        ([STEP, *[("step", 0.2, True)] * 9], None),  # each phase has its own time
    ],
)
def test_a_process_that_is_stuck_ends(phases: list[tuple[str, float | str, bool]], waited: int | None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PHASES, repr(phases)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if waited is None:
        assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
    else:
        line = f"SIGTERM: the {phases[-1][0]} did not end within {waited} s; another process may have failed"
        assert (done.returncode, done.stdout) == (143, "")
        assert done.stderr == f"pretrain_camopd.py: error: {line}\n"


FORKS = """
import os, signal, sys, time
from megatron_camopd.runtime import signals
signals._FIRST_PATIENCE = 1.0
with signals.stop_requests(signal.SIGTERM) as request:
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    lives = os.fork()
    if lives == 0:
        time.sleep(5)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM  # as a process without the block
    time.sleep(1.5)
    assert request.name is None
    began = time.monotonic()
print("ended", time.monotonic() - began < 1, flush=True)
os.kill(lives, signal.SIGKILL)
"""


def test_a_forked_child_neither_arms_nor_delays_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ended True\n"), done.stderr


LAUNCHED = """
import os, time
{first}
os.environ["TORCHELASTIC_RUN_ID"] = "x"
from megatron_camopd.runtime.signals import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("first", ["", "os.getppid = lambda: 1"], ids=["process", "process 1"])
def test_a_process_ends_with_its_launcher(first: str) -> None:
    """Also one whose launcher is process 1, as in a container: that alone is no sign of an orphan."""
    script = LAUNCHED.format(first=first)
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    child = Path(f"/proc/{int(launcher.stdout.readline())}")
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while child.exists() and (child / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the orphan lives on"
        time.sleep(0.02)
