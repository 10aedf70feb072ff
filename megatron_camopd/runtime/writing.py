"""Errors of the disk, told as one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_camopd.errors import ConfigurationError, SaveError
from megatron_camopd.runtime.collectives import first_problem


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


@contextlib.contextmanager
def written_by_all(place: str | Path) -> Iterator[None]:
    """End all ranks alike if one of them cannot write what the block writes; the end of the block is collective.

    Args:
        place: The file, or the flag with its value.

    Raises:
        SaveError: The block raised OSError, SaveError or ConfigurationError on a rank.
    """
    problem = None
    try:
        with writing(place):
            yield
    except (SaveError, ConfigurationError) as error:
        problem = str(error)
    if (problem := first_problem(problem)) is not None:
        raise SaveError(problem)
