"""The frame of every command for people: its parser, its errors in one line, its end by a signal.

    def main(flags):
        return run_program("report.py", lambda: print(run(parse_arguments(flags))))

    if __name__ == "__main__":
        stop_on_signals("report.py")
        sys.exit(main(sys.argv[1:]))

A mistake prints ``report.py: error: ...`` and gives exit status 2. SIGTERM, SIGHUP and Ctrl-C run what
:func:`cleaned_up` registered and end the process at once with 128 + the signal's number. They raise no exception: one
that is raised inside a library, while it is imported or writes, may be swallowed or abort the process.
``pretrain_camopd.py`` has processes to look after and a frame of its own; its lines have the same form.
"""

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_camopd.config.words import check_value, one_line, printable, shown
from megatron_camopd.errors import ConfigurationError

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Parser(argparse.ArgumentParser):
    """Argument parser that raises ConfigurationError, without usage text, and checks every text and path.

    Texts are taken for paths or names, which have limits, with the exceptions below.

    Args:
        unlimited: Names of arguments whose texts may have any length.
        multiline: Names of arguments whose texts may have any length and several lines.
    """

    def __init__(
        self, *args: Any, unlimited: Sequence[str] = (), multiline: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._multiline = frozenset(multiline)
        self._unlimited = frozenset(unlimited) | self._multiline

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as a ConfigurationError."""
        raise ConfigurationError(one_line(message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # also of parse_args and sub-commands
        """Parse as argparse does, and check the values."""
        words = list(sys.argv[1:] if args is None else args)
        dashes = next((word for word in words if word.startswith("--") and word.endswith("=--")), None)
        if dashes is not None:  # argparse would give the flag an empty list
            self.error(f"argument {dashes.removesuffix('=--')}: has the value '--'; give one of its own")
        found, others = super().parse_known_args(words, namespace)
        for action in self._actions:
            name, value = action.dest, getattr(found, action.dest, None)
            check_value(_shown(action), value, is_path=name not in self._unlimited, multiline=name in self._multiline)
        return found, others


def _shown(action: argparse.Action) -> str:
    """Return the name of an argument as a user knows it."""
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


def path_argument(text: str) -> Path:
    """Read a path as an argparse ``type``; an empty text, which would mean the current folder, is none.

    Raises:
        ArgumentTypeError: ``text`` is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty; expected a path")
    return Path(text)


def run_program(name: str, work: Callable[[], object]) -> int:
    """Run ``work`` and return the exit status of the program ``name``; see the module's docstring."""
    try:
        work()
    except ConfigurationError as error:
        _close_bars(error)
        return _say(name, f"error: {printable(str(error))}", 2)
    except OSError as error:
        _close_bars(error)
        where = f"{shown(str(error.filename))}: " if error.filename else ""
        return _say(name, f"error: {where}{one_line(error.strerror or str(error))}", 2)
    except KeyboardInterrupt:
        return _say(name, "stopped by SIGINT", 128 + signal.SIGINT)
    return 0


def _close_bars(error: BaseException | None) -> None:
    """Let go of what the frames of ``error`` hold: generators, and the progress bars open in them, end their lines."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _say(name: str, text: str, status: int) -> int:
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return status


_cleanups: list[Callable[[], object]] = []


@contextlib.contextmanager
def cleaned_up(action: Callable[[], object]) -> Iterator[None]:
    """Run ``action`` when the block is left, in whatever way: at its end, by an exception, or by a signal.

    See :func:`stop_on_signals`. The action removes what is unfinished and must do nothing where it finds nothing.
    """
    _cleanups.append(action)
    try:
        yield
    finally:
        action()
        _cleanups.remove(action)


def stop_on_signals(name: str) -> None:
    """Let signals end the program ``name`` with one line, after what it has staged was removed; called once, first.

    A signal that the caller ignores, as nohup does, stays ignored.
    """
    caught = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def stop(number: int, _: object) -> NoReturn:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)  # a second one would disturb the cleaning up
        for action in reversed(_cleanups):
            with contextlib.suppress(Exception):
                action()
        bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
        line = f"{name}: stopped by {signal.Signals(number).name}\n"
        # Not by print: the signal may have come while another print was at work.
        os.write(2, (f"\n{line}" if len(bars) else line).encode())
        os._exit(128 + number)

    for number in caught:
        signal.signal(number, stop)
