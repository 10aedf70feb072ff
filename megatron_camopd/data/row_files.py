"""Rows of JSONL and Parquet files: read one after the other to be checked, and again one by one when they are needed.

The choice made: what is wrong with a file ends the run before it begins, with one line that names flag, file and row. A
row that is silently dropped changes the data of the experiment, and a bad row that is found at step 90 costs the run.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_camopd.errors import ConfigurationError

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_PARQUET_BATCH_ROWS = 1024


class RowFile:
    """One file of rows. ``columns``: those of a Parquet file that matter, of which it needs one of ``needed``."""

    def __init__(self, path: Path, *, flag: str, columns: Sequence[str], needed: Sequence[str]) -> None:
        """Errors: ConfigurationError for a missing file or another kind of file."""
        self.path, self.flag, self._columns, self._needed = path, flag, columns, needed
        if not path.exists():
            fail(flag, str(path), "does not exist; name a .jsonl or .parquet file")
        if path.suffix.lower() not in _READERS:
            fail(flag, str(path), f"has the extension {path.suffix!r}; expected .jsonl or .parquet")

    def sha256(self) -> bytes:
        """The digest of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def rows(self) -> Iterator[tuple[int, int, Any]]:
        """(number from 1, place, row) of every row that is not blank; ``place`` is for :meth:`row_at`.

        The number is the line of a JSONL file, the row of a Parquet file.
        """
        return _READERS[self.path.suffix.lower()](self)

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

    def _jsonl_rows(self) -> Iterator[tuple[int, int, Any]]:
        # Binary lines end at \n only; text mode would need a decoded file and could not say which line is broken.
        with self.path.open("rb") as file:
            place = 0
            for number, line in enumerate(file, start=1):
                start, place = place, place + len(line)
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                    if not text:
                        continue
                    row = json.loads(text)
                    if _SURROGATE_ESCAPE.search(line):
                        # Half a surrogate pair is valid JSON but no text: tokenizers reject it, hours later.
                        json.dumps(row, ensure_ascii=False).encode("utf-8")
                except (UnicodeDecodeError, UnicodeEncodeError) as error:
                    self._fail(number, f"is not valid UTF-8 ({error.reason}); save the file as UTF-8")
                except (ValueError, RecursionError) as error:
                    reason = str(error)
                    if isinstance(error, json.JSONDecodeError):
                        reason = f"column {error.colno}: {error.msg}"
                    self._fail(number, f"is not JSON ({reason}); each line must be one JSON object")
                yield number, start, row

    def _parquet_rows(self) -> Iterator[tuple[int, int, Any]]:
        import pyarrow  # imported here: JSONL users need not wait for it
        import pyarrow.parquet

        try:
            # The context manager closes the file however the loop over this generator ends.
            with pyarrow.parquet.ParquetFile(self.path) as file:
                columns = [name for name in self._columns if name in file.schema_arrow.names]
                if not set(self._needed) & set(columns):
                    found = ", ".join(file.schema_arrow.names) or "none"
                    needed = " or ".join(f'"{name}"' for name in self._needed)
                    fail(self.flag, str(self.path), f"has the columns {one_line(found)}; it needs {needed}")
                number = 0
                for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
                    for row in self._batch_rows(batch, number):
                        number += 1
                        yield number, number - 1, without_nulls(row)
        except pyarrow.ArrowException as error:
            fail(self.flag, str(self.path), f"is not a readable Parquet file ({one_line(str(error))})")

    def _batch_rows(self, batch: Any, rows_before: int) -> list[dict[str, Any]]:
        """Convert one Arrow batch to dictionaries; on broken UTF-8 find the row that holds it."""
        try:
            return batch.to_pylist()
        except UnicodeDecodeError:
            for offset in range(batch.num_rows):
                try:
                    batch.slice(offset, 1).to_pylist()
                except UnicodeDecodeError as error:
                    number = rows_before + offset + 1
                    self._fail(number, f"is not valid UTF-8 ({error.reason}); write the column as UTF-8 text")
            raise

    def _fail(self, number: int, what: str) -> NoReturn:
        fail(self.flag, self.where(number), what)


_READERS: dict[str, Callable[[RowFile], Iterator[tuple[int, int, Any]]]] = {
    ".jsonl": RowFile._jsonl_rows,
    ".parquet": RowFile._parquet_rows,
}


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
