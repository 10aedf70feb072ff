"""Signals that stop a run: asked to end, it saves first; left alone by its launcher, it ends at once."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from types import FrameType

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """The first signal that asked this process to stop, by name, or None."""

    name: str | None = None


@contextlib.contextmanager
def stop_requests(*signals: signal.Signals) -> Iterator[StopRequest]:
    """Note the given signals during the block instead of ending at once; the block looks when it is convenient."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.name = request.name or signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in set(signals)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    if launcher == 1 or os.getppid() != launcher:  # it died before the system was asked
        os._exit(128 + signal.SIGKILL)
