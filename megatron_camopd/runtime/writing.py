"""Errors of the disk, told as one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_camopd.errors import SaveError


@contextlib.contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Name the place where the block cannot write, such as on a full disk.

    Args:
        place: The file, or the flag with its value.

    Raises:
        SaveError: The block raised OSError; the text has its reason.
    """
    try:
        yield
    except OSError as error:
        raise SaveError(f"{place}: cannot be written ({error.strerror or error})") from error
