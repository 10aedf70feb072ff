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
        request.progress()
    assert signal.getsignal(number) is before


STUCK = """
import ctypes, sys, signal, time
from megatron_camopd.runtime.signals import stop_requests
with stop_requests(signal.SIGTERM, signal.SIGTERM) as request:
    request.patience = float(sys.argv[1])
    print("ready", flush=True)
    if sys.argv[2] == "stuck":  # in a library that does not return to Python, like a collective without its peer
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    for _ in range(30):
        time.sleep(0.1)
        request._progress = time.monotonic()
print("ended", flush=True)
"""


@pytest.mark.parametrize(("work", "status"), [("stuck", 143), ("slow", 0)])
def test_a_process_that_is_stuck_ends(work: str, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, "1.0", work], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # for the second lock
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    if status:
        assert error.startswith("pretrain_camopd.py: error: SIGTERM: no step ended within 1 s") and out == ""
        assert error.count("\n") == 1
    else:
        assert out == "ended\n" and error == ""


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
