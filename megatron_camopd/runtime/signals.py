"""Signals that stop a run: asked to end, it saves first; left alone by its launcher, it ends at once."""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
_FIRST_PATIENCE = 900.0
"""Seconds that a step or save may take after a signal if none of its kind has ended yet."""
_LEAST_PATIENCE = 60.0


class StopRequest:
    """The first signal that asked this process to stop, by name, or None; made by :func:`stop_requests`.

    A process that waits for another one in a collective never gets to look at the request. When the other one has
    failed, torchrun sends SIGTERM to those that are left, and waits. So a thread ends this process if after the signal
    a phase of the run lasts longer than ``patience`` seconds.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.patience = _FIRST_PATIENCE
        self._phase, self._begun = "", time.monotonic()
        self._longest: dict[str, float] = {}
        self._ended = threading.Event()

    def begin(self, phase: str) -> None:
        """Note that a phase of the run begins, and that the one before has ended.

        Args:
            phase: The kind of work, such as "step" or "save". After a signal it may take a minute and three times as
                long as the longest of its kind so far.
        """
        now = time.monotonic()
        self._longest[self._phase] = max(self._longest.get(self._phase, 0.0), now - self._begun)
        known = self._longest.get(phase)
        self.patience = _FIRST_PATIENCE if known is None else _LEAST_PATIENCE + 3 * known
        self._phase, self._begun = phase, now

    def _watch(self, wakeup: int, numbers: frozenset[int]) -> None:
        """Wait for a signal, then for the end of the process, on a thread of its own; the main one may be stuck."""
        while not set(received := os.read(wakeup, 64)) & numbers:
            if not all(received):
                return  # the block has ended
        since = time.monotonic()
        while time.monotonic() - max(since, self._begun) < self.patience:
            if self._ended.wait(min(1.0, self.patience / 10)):
                return
        name = signal.Signals(next(iter(set(received) & numbers))).name
        phase = self._phase or "work"
        text = f"{name}: the {phase} did not end within {self.patience:.0f} s; another process may have failed"
        os.write(2, f"pretrain_camopd.py: error: {text}\n".encode())
        os._exit(128 + signal.SIGTERM)


_before: dict[signal.Signals, Any] = {}
"""Handlers of this process before :func:`stop_requests`, while it is in effect."""


def _forget_in_child() -> None:
    """Let a forked child react to signals as before the block; it must not arm the watch of its parent."""
    if _before:
        signal.set_wakeup_fd(-1)
        for number, handler in _before.items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def stop_requests(*signals: signal.Signals) -> Iterator[StopRequest]:
    """Note the given signals during the block instead of ending at once; the block looks when it is convenient."""
    request, numbers = StopRequest(), frozenset(map(int, signals))

    def note(number: int, frame: FrameType | None) -> None:
        request.name = request.name or signal.Signals(number).name

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _before.update({number: signal.signal(number, note) for number in set(signals)})
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to even if Python is stuck
    thread = threading.Thread(target=request._watch, args=(reading, numbers), name="stop requests", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in _before.items():
            signal.signal(number, handler)
        _before.clear()
        request._ended.set()
        with contextlib.suppress(BlockingIOError):  # full of signals: the thread is awake
            os.write(writing, b"\0")
        thread.join()
        os.close(writing)
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
