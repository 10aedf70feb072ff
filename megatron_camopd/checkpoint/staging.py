"""A folder that appears under its final name complete or not at all.

The converters write gigabytes for minutes; whatever stops them half-way must not leave something that looks like a
checkpoint. They write into a hidden folder beside the target, which is renamed at the end: a rename within one
directory is atomic. The hidden folder's name tells process and machine, so that the next conversion to the same target
removes what a process left that was killed before it could clean up.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_camopd.config.program import cleaned_up
from megatron_camopd.errors import ConfigurationError


@contextmanager
def staged_folder(target: Path, *, flag: str) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` when the block ends without an exception.

    Parents of ``target`` are made, and removed again if the block fails. On every error the staged folder is removed.

    Raises:
        ConfigurationError: ``target`` is a file or a folder with something in it, or cannot be written (a full disk
            included); the line names ``flag``.
    """
    given, target = target, Path(os.path.realpath(target))
    staged = target.parent / f".{target.name}.partial-{os.getpid()}@{socket.gethostname()}"
    made: list[Path] = []

    def clean() -> None:
        shutil.rmtree(staged, ignore_errors=True)
        for folder in reversed(made):  # not those that the target lies in now
            with suppress(OSError):
                folder.rmdir()

    try:
        if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
            found = "a folder that is not empty" if target.is_dir() else "not a folder"
            raise ConfigurationError(f"{flag} {given}: is {found}; expected a new or empty folder")
        with cleaned_up(clean):
            _remove_abandoned(target)
            _make_parents(staged, made)
            staged.mkdir()
            yield staged
            os.rename(staged, target)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise ConfigurationError(
            f"{flag} {given}: cannot be written ({reason}); expected a writable place with enough room"
        ) from error


def _make_parents(path: Path, made: list[Path]) -> None:
    """Make the missing parents of ``path``, and note each in ``made`` as it is made."""
    for folder in reversed([folder for folder in path.parents if not folder.exists()]):
        made.append(folder)
        folder.mkdir(exist_ok=True)


def _remove_abandoned(target: Path) -> None:
    """Remove the staged folders of ``target`` whose process on this machine is gone; those of others are theirs."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{target.name}.partial-") + r"(\d{1,9})(?:@(.*))?")
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and match[2] in (None, socket.gethostname()) and not _is_running(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Return whether a process has this number; one that has ended and waits for its parent does not count."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True  # no such file system, or it ended just now
    return state != "Z"
