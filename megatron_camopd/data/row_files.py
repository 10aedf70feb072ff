"""Rows of JSONL and Parquet files: read one after the other to be checked, and again one by one when they are needed.

The choice made: what is wrong with a file ends the run before it begins, with one line that names flag, file and row. A
row that is silently dropped changes the data of the experiment, and a bad row that is found at step 90 costs the run.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_camopd.errors import ConfigurationError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Rows of reasoning data have 50 KB and more: a batch stays at some 10 MB.
_PARQUET_BATCH_ROWS = 256
_PARQUET_BUFFER_BYTES = 1 << 20
_SUFFIXES = (".jsonl", ".parquet")


class RowFile:
    """One file of rows. ``columns``: those of a Parquet file that matter, of which it needs one of ``needed``."""

    def __init__(self, path: Path, *, flag: str, columns: Sequence[str], needed: Sequence[str]) -> None:
        """Errors: ConfigurationError for a missing file or another kind of file."""
        self.path, self.flag, self._columns, self._needed = path, flag, columns, needed
        if not path.exists():
            fail(flag, str(path), "does not exist; name a .jsonl or .parquet file")
        if path.suffix.lower() not in _SUFFIXES:
            fail(flag, str(path), f"has the extension {path.suffix!r}; expected .jsonl or .parquet")

    def sha256(self) -> bytes:
        """The digest of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def rows(self) -> Iterator[tuple[int, int, Any]]:
        """(number from 1, place, row) of every row that is not blank; ``place`` is for :meth:`row_at`.

        The number is the line of a JSONL file, the row of a Parquet file, whose null fields are dropped.
        """
        if self.path.suffix.lower() == ".jsonl":
            yield from json_line_rows(self.path, self.flag)
            return
        for number, row in parquet_rows(self.path, self.flag, self._columns, needed=self._needed):
            yield number, number - 1, without_nulls(row)

    def row_at(self, place: int) -> Any:
        """The row that :meth:`rows` found at ``place`` of a JSONL file (its byte), read again."""
        with self.path.open("rb") as file:
            file.seek(place)
            line = file.readline()
        try:
            return json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            fail(self.flag, str(self.path), f"changed while it was in use ({error}); leave data files as they are")

    def where(self, number: int) -> str:
        """The place to look at, for messages."""
        return where(self.path, number)


def json_line_rows(path: Path, flag: str) -> Iterator[tuple[int, int, Any]]:
    """(line from 1, its byte, row) of a JSONL file; blank lines are passed over.

    Errors: ConfigurationError for broken UTF-8 and broken JSON, naming the line; OSError where it cannot be read.
    """
    # Binary lines end at \n only; text mode would need a decoded file and could not say which line is broken.
    with path.open("rb") as file:
        place = 0
        for number, line in enumerate(file, start=1):
            start, place = place, place + len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if not text:
                    continue
                row = json.loads(text)
                check_surrogates(text, row)
            except UnicodeError as error:
                reason = getattr(error, "reason", error)
                fail(flag, where(path, number), f"is not valid UTF-8 ({reason}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                fail(
                    flag, where(path, number), f"is not JSON ({json_reason(error)}); each line must be one JSON object"
                )
            yield number, start, row


def check_surrogates(text: str, values: Any) -> None:
    """Half a surrogate pair is valid JSON but no text, which tokenizers reject hours later: raises UnicodeError."""
    if _SURROGATE_ESCAPE.search(text):
        json.dumps(values, ensure_ascii=False).encode("utf-8")


def json_reason(error: Exception) -> str:
    """What is wrong with a JSON text, with its column where that is known."""
    return f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else one_line(str(error))


def parquet_rows(
    path: Path, flag: str, columns: Sequence[str], *, needed: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a Parquet file, with those of ``columns`` that it has.

    Errors: ConfigurationError for a damaged file, broken UTF-8, or where not one of ``needed`` (if any) is there.
    """
    import pyarrow  # imported here: JSONL users need not wait for it

    try:
        # The context manager closes the file however the loop over this generator ends.
        with open_parquet(path) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            if needed and not set(needed) & set(present):
                found = ", ".join(file.schema_arrow.names) or "none"
                wanted = " or ".join(f'"{name}"' for name in needed)
                fail(flag, str(path), f"has the columns {one_line(found)}; it needs {wanted}")
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=present):
                for row in _batch_rows(batch, path, number, flag):
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        fail(flag, str(path), f"is not a readable Parquet file ({one_line(str(error))})")


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` whose columns are read in pieces, not whole row groups of them."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)


def _batch_rows(batch: Any, path: Path, rows_before: int, flag: str) -> list[dict[str, Any]]:
    """Convert one Arrow batch to dictionaries; on broken UTF-8 find the row that holds it."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for offset in range(batch.num_rows):
            try:
                batch.slice(offset, 1).to_pylist()
            except UnicodeDecodeError as error:
                place = where(path, rows_before + offset + 1)
                fail(flag, place, f"is not valid UTF-8 ({error.reason}); write the column as UTF-8 text")
        raise


def without_nulls(value: Any) -> Any:
    """Drop null fields at every depth: a Parquet struct has all fields of its column, absent ones read as null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def where(path: Path, number: int) -> str:
    """``<file> line 17`` or ``<file> row 17``."""
    return f"{path} {'row' if path.suffix.lower() == '.parquet' else 'line'} {number}"


def shown(value: Any) -> str:
    """A value as one short line."""
    return one_line(repr(value), limit=40)


def one_line(text: str, *, limit: int = 160) -> str:
    """``text`` without line breaks, cut at ``limit`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def fail(flag: str, place: str, what: str) -> NoReturn:
    """Errors: ConfigurationError ``<flag>: <place> <what>``."""
    raise ConfigurationError(f"{flag}: {place} {what}") from None
