"""Reading a run's JSON lines: records with the line they come from, and finite numbers."""

import json
from pathlib import Path
from typing import Any

from megatron_camopd.errors import ConfigurationError

LARGEST = 1e100


def read_lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Read a file of JSON objects, one a line; empty lines are passed over.

    A last line without its line end, which a run that is still writing or was killed leaves, is passed over too.

    Returns:
        (where, record) of each line, ``where`` naming file and line for messages; and notes about what was left out.

    Raises:
        ConfigurationError: the file cannot be read, or one of its other lines is no JSON object.
    """
    lines = read_file(path).split(b"\n")
    found: list[tuple[str, dict[str, Any]]] = []
    notes: list[str] = []
    start = 0
    for number_of_line, line in enumerate(lines, start=1):
        where = f"{path}, line {number_of_line}"
        start, here = start + len(line) + 1, start
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number_of_line == len(lines):
                notes.append(f"The last line of {path}, line {number_of_line}, is cut off and was left out.")
                continue
            if isinstance(error, UnicodeDecodeError):
                place = here + error.start
                raise ConfigurationError(f"{path}: byte {place} is not UTF-8 text; it must hold JSON lines") from error
            reason = getattr(error, "msg", type(error).__name__)
            raise ConfigurationError(f"{where}: is no JSON object ({reason})") from error
        if not isinstance(record, dict):
            raise ConfigurationError(f"{where}: is {json.dumps(record)[:40]}; it must be a JSON object")
        found.append((where, record))
    return found, notes


def read_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        ConfigurationError: the file cannot be read, or is a folder, a FIFO or a device, which might never end.
    """
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}; it must be a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error


def number(value: Any) -> float | None:
    """Return ``value`` as a float where it is a number up to LARGEST, or None; truth values are no numbers.

    Sums, squares and percentages of such numbers are finite, and figures can show them. Numbers too close to 0 for the
    scale of a figure are 0.
    """
    if not is_number(value) or not abs(value) <= LARGEST:  # NaN is not
        return None
    return float(value) if abs(value) >= 1 / LARGEST else 0.0


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a number of JSON, NaN and infinity included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(value: Any) -> list[float | None]:
    """Return the entries of a list as :func:`number` has them; [] where ``value`` is no list."""
    return [number(entry) for entry in value] if isinstance(value, list) else []


def whole_number(value: Any) -> int | None:
    """Return ``value`` where it is a whole number, or None; truth values are no numbers."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
