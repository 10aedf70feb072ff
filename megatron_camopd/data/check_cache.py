"""Results of row checks on disk, by what decides them, so that the same files are rendered once.

A result is a small JSON file in ``$XDG_CACHE_HOME`` or ``~/.cache``, under ``megatron_camopd/``. It appears whole
(temporary name, then rename). A cache that cannot be read or written is no error: the rows are then checked again.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_camopd.data.row_check import VERSION, RowCheck
from megatron_camopd.data.row_report import RowReport

_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def report_key(check: RowCheck, *, files_sha256: str, rows: Iterable[str], tokenizer_sha256: str) -> str:
    """Return the digest of all that decides the report of a check.

    Args:
        check: the check, with its settings.
        files_sha256: digest of the data files.
        rows: which rows of these files are checked: a text for each, or one for all.
        tokenizer_sha256: digest of the tokenizer's files.
    """
    chosen = hashlib.sha256()
    for row in rows:
        chosen.update(row.encode() + b"\n")
    parts = {
        "version": VERSION,
        "files": files_sha256,
        "rows": chosen.hexdigest(),
        "tokenizer": tokenizer_sha256,
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        **check.settings(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_report(key: str) -> RowReport | None:
    """Return the report kept under ``key``, or None if there is none that can be read."""
    try:
        found = json.loads(_path(key).read_text(encoding="utf-8"))
        report = RowReport(**found)
    except (OSError, ValueError, TypeError, RuntimeError, RecursionError):
        return None
    # A field of the report is a number, or an object of numbers by name.
    for number, default in zip(dataclasses.astuple(report), dataclasses.astuple(RowReport()), strict=True):
        if isinstance(default, dict) != isinstance(number, dict):
            return None
        if not all(map(_is_count, number.values() if isinstance(number, dict) else [number])):
            return None
    return report


def store_report(key: str, report: RowReport) -> None:
    """Keep ``report`` under ``key``, if that is possible."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _path(key: str) -> Path:
    """Return the file of a key; RuntimeError if the user has no home directory."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"  # the standard says: absolute, or ignore it
    return root / "megatron_camopd" / "row_checks" / f"{key}.json"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
