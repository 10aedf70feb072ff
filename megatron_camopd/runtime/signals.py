"""Signals that stop a run: asked to end, it saves first; left alone by its launcher, it ends at once."""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_PR_SET_PDEATHSIG = 1
_FIRST_PATIENCE = 900.0
"""Seconds that the first step may take after a signal; the times of later steps are known."""


class StopRequest:
    """The first signal that asked this process to stop, by name, or None; made by :func:`stop_requests`.

    A process that waits for another one in a collective never gets to look at the request. When the other one has
    failed, torchrun sends SIGTERM to those that are left, and waits. So a thread ends this process if no progress is
    made for ``patience`` seconds after the signal.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.patience = _FIRST_PATIENCE
        self._progress = time.monotonic()
        self._longest = 0.0
        self._ended = False

    def progress(self) -> None:
        """Note that a step or a save has ended: after a signal the next one may take three times the longest so far."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._progress)
        self._progress, self.patience = now, 60 + 3 * self._longest

    def _watch(self, wakeup: int, numbers: frozenset[int]) -> None:
        """Wait for a signal, then for the end of the process, on a thread of its own; the main one may be stuck."""
        while not set(received := os.read(wakeup, 64)) & numbers:
            if not received:
                return  # the block has ended
        since = time.monotonic()
        while time.monotonic() - max(since, self._progress) < self.patience:
            time.sleep(min(1.0, self.patience / 10))
            if self._ended:
                return
        name = signal.Signals(next(iter(set(received) & numbers))).name
        text = f"{name}: no step ended within {self.patience:.0f} s, another process may have failed; nothing was saved"
        os.write(2, f"pretrain_camopd.py: error: {text}\n".encode())
        os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stop_requests(*signals: signal.Signals) -> Iterator[StopRequest]:
    """Note the given signals during the block instead of ending at once; the block looks when it is convenient."""
    request, numbers = StopRequest(), frozenset(map(int, signals))

    def note(number: int, frame: FrameType | None) -> None:
        request.name = request.name or signal.Signals(number).name

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, note) for number in set(signals)}
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to even if Python is stuck
    thread = threading.Thread(target=request._watch, args=(reading, numbers), name="stop requests", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        request._ended = True
        os.close(writing)
        thread.join()
        os.close(reading)


def end_with_launcher() -> None:
    """Let the system kill this process when torchrun, which started it, dies; without effect if it was not torchrun.

    Otherwise the processes of a killed torchrun would go on, and write to the folder of the run that replaces theirs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):  # no Linux
        return
    if os.getppid() != launcher:  # it died before the system was asked
        os._exit(128 + signal.SIGKILL)
