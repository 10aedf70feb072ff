"""Reading a run's JSON lines: records with the line they come from, and finite numbers."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_camopd.errors import ConfigurationError


def read_lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Read a file of JSON objects, one a line; empty lines are passed over.

    A last line without its line end, which a run that is still writing or was killed leaves, is passed over too.

    Returns:
        (where, record) of each line, ``where`` naming file and line for messages; and notes about what was left out.

    Raises:
        ConfigurationError: the file cannot be read, or one of its other lines is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    lines = content.split(b"\n")
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


def number(value: Any) -> float | None:
    """Return ``value`` as a float where it is a finite number, or None; truth values are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond any float
        return None


def whole_number(value: Any) -> int | None:
    """Return ``value`` where it is a whole number, or None; truth values are no numbers."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
