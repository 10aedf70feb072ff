"""A folder that appears under its final name complete or not at all.

The converters write gigabytes for minutes; whatever stops them half-way must not leave something that looks like a
checkpoint. They write into a hidden folder beside the target, which is renamed at the end: a rename within one
directory is atomic.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_camopd.errors import ConfigurationError


@contextmanager
def staged_folder(target: Path, *, flag: str) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` when the block ends without an exception.

    Parents of ``target`` are made. On every error the staged folder is removed.

    Raises:
        ConfigurationError: ``target`` is a file or a folder with something in it, or cannot be written (a full disk
            included); the line names ``flag``.
    """
    target = Path(os.path.realpath(target))
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        found = "a folder that is not empty" if target.is_dir() else "not a folder"
        raise ConfigurationError(f"{flag} {target}: is {found}; expected a new or empty folder")
    staged = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        raise _not_writable(target, flag, error) from error
    try:
        yield staged
        os.rename(staged, target)
    except OSError as error:
        raise _not_writable(target, flag, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _not_writable(target: Path, flag: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{flag} {target}: cannot be written ({error.strerror}); expected a writable place")
