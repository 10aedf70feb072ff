"""Rows of JSONL and Parquet files, read in order to be checked, or (JSONL) one by one when they are needed.

Design choice: a mistake in a file ends the run before training starts, with one line that names flag, file and row.
A row that is silently dropped would change the data of the experiment, and a bad row that is found at step 90 would
cost the run.

Design choice: null fields are dropped at every depth of a row, in both formats. A Parquet column holds the fields
of all rows, so that those that a row lacks are read as null, and a null of the row's own cannot be told from them. The
same rows as JSONL must give the same prompts. A value that is written as JSON text keeps its nulls.

A file that changes while it is read would give rows that its digest does not stand for, so it is refused. It is read
up to the size it had at first, so that a file that keeps growing comes to an end.
"""

import errno
import hashlib
import json
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_camopd.data.json_text import KeyGivenTwiceError, check_surrogates, parse_json, without_nulls
from megatron_camopd.errors import ConfigurationError

# Rows of reasoning data take 50 KB and more, so that a batch takes about 10 MB.
_PARQUET_BATCH_ROWS = 256
_PARQUET_BUFFER_BYTES = 1 << 20
_SUFFIXES = (".jsonl", ".parquet")
_CHUNK_BYTES = 1 << 20


class RowFile:
    """One JSONL or Parquet file of rows.

    Attributes:
        unread: number of rows with each field that is not read, known once :meth:`rows` has come to its end.
    """

    def __init__(
        self, path: Path, *, flag: str, columns: Sequence[str], needed: Sequence[str], refused: Sequence[str] = ()
    ) -> None:
        """Check that the file exists and is of a known kind, without opening it.

        Args:
            path: a ``.jsonl`` or ``.parquet`` file.
            flag: the flag that named it, for error texts.
            columns: fields that are read.
            needed: columns of which a Parquet file must have at least one.
            refused: fields that the caller only reads to refuse rows that have them.

        Raises:
            ConfigurationError: the file does not exist, is no regular file or has another extension.
        """
        self.path, self.flag, self._columns, self._needed, self._refused = path, flag, columns, needed, refused
        self.unread: Counter[str] = Counter()
        self._size, self._changed_at = _regular_file(path, flag)
        if path.suffix.lower() not in _SUFFIXES:
            fail(flag, str(path), f"has the extension {path.suffix!r}; expected .jsonl or .parquet")

    def sha256(self) -> bytes:
        """Return the digest of the file's bytes.

        Raises:
            ConfigurationError: the file has changed since it was first looked at.
        """
        digest, left = hashlib.sha256(), self._size
        with self.path.open("rb") as file:
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
        self._check_unchanged()
        return digest.digest()

    def rows(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (number, offset, row) for every row; blank lines of a JSONL file are skipped.

        The number is the line of a JSONL file or the row of a Parquet file, counted from 1. The offset is the byte at
        which the line of a JSONL file begins, for :meth:`row_at`, or the number of rows before it in a Parquet file.
        Null fields are dropped.

        Raises:
            ConfigurationError: a row cannot be read, or the file has changed since it was first looked at.
        """
        try:
            if self.path.suffix.lower() == ".jsonl":
                known, self.unread = frozenset(self._columns), Counter()
                for number, offset, found in json_line_rows(self.path, self.flag, size=self._size):
                    row = self._without_nulls(found, number)
                    if isinstance(row, dict):
                        self.unread.update(row.keys() - known)
                    yield number, offset, row
            else:
                columns = [*self._columns, *self._refused]
                for number, row in parquet_rows(self.path, self.flag, columns, needed=self._needed):
                    yield number, number - 1, self._without_nulls(row, number)
                self.unread = _other_columns(self.path, self._columns)
        except ConfigurationError:
            self._check_unchanged()  # a line that another program has half written: say that
            raise
        self._check_unchanged()

    def row_at(self, offset: int) -> Any:
        """Read the row of a JSONL file that begins at byte ``offset``, as :meth:`rows` gave it.

        Raises:
            ConfigurationError: there is no JSON at ``offset`` any more.
        """
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            return without_nulls(json.loads(line.decode("utf-8-sig")))
        except ValueError as error:
            fail(self.flag, str(self.path), f"changed while it was in use ({error}); leave data files as they are")

    def _without_nulls(self, row: Any, number: int) -> Any:
        try:
            return without_nulls(row)
        except RecursionError:
            fail(self.flag, self.where(number), "has lists or objects nested too deeply; flatten them")

    def _check_unchanged(self) -> None:
        if _regular_file(self.path, self.flag) != (self._size, self._changed_at):
            fail(self.flag, str(self.path), "changed while it was read; give a file that is complete")

    def where(self, number: int) -> str:
        """Return file and row for error texts: ``<file> line 17`` or ``<file> row 17``."""
        return where(self.path, number)


def _regular_file(path: Path, flag: str) -> tuple[int, int]:
    """Return size and time of the last change (ns) of a regular file, which is not opened: a pipe would block.

    Raises:
        ConfigurationError: the file does not exist, or is a folder, a pipe or a device.
    """
    name = one_line(str(path).replace("\0", "\\0"), limit=4096)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        code = getattr(error, "errno", None)
        if code in (errno.ENOENT, errno.ENOTDIR):
            fail(flag, name, "does not exist; name a .jsonl or .parquet file")
        if code == errno.ENAMETOOLONG:
            fail(flag, one_line(name), "is too long for a file name; name a .jsonl or .parquet file")
        reason = one_line(getattr(error, "strerror", None) or str(error))
        fail(flag, name, f"cannot be read ({reason}); give a readable .jsonl or .parquet file")
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a device or a socket"
        fail(flag, name, f"is {kind}, not a regular file; name a .jsonl or .parquet file")
    return found.st_size, found.st_mtime_ns


def json_line_rows(path: Path, flag: str, *, size: int | None = None) -> Iterator[tuple[int, int, Any]]:
    """Yield (line number from 1, byte offset, row) for every line of a JSONL file that is not blank.

    Args:
        path: the file.
        flag: the flag that named it, for error texts.
        size: number of bytes to read at most; None: to the end.

    Raises:
        ConfigurationError: a line is not valid UTF-8 or not JSON, or has a key twice. The text names the line.
        OSError: the file cannot be read.
    """
    # Read as bytes: text mode would also split lines at other characters than \n, and could not say which line is not
    # valid UTF-8.
    with path.open("rb") as file:
        end = number = 0
        while line := file.readline() if size is None else file.readline(size - end):
            number += 1
            start, end = end, end + len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if not text:
                    continue
                row = parse_json(text)
                check_surrogates(text, row)
            except KeyGivenTwiceError as error:
                fail(flag, where(path, number), f"has the key {shown(error.key)} twice in one object; keep one of them")
            except UnicodeError as error:
                reason = getattr(error, "reason", error)
                fail(flag, where(path, number), f"is not valid UTF-8 ({reason}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                fail(
                    flag, where(path, number), f"is not JSON ({json_reason(error)}); each line must be one JSON object"
                )
            yield number, start, row


def json_reason(error: Exception) -> str:
    """Return the reason why a JSON text cannot be parsed, with the column if it is known."""
    return f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else one_line(str(error))


def parquet_rows(
    path: Path, flag: str, columns: Sequence[str], *, needed: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, row) for every row of a Parquet file, with those of ``columns`` that the file has.

    Raises:
        ConfigurationError: the file is damaged, holds text that is not valid UTF-8, or has none of the columns
            ``needed``.
    """
    import pyarrow  # imported here, because the import takes time that users of JSONL need not spend

    try:
        # The context manager closes the file even if the caller stops iterating early.
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
    """Open a ``pyarrow.parquet.ParquetFile`` that reads columns in small pieces instead of whole row groups."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)


def _other_columns(path: Path, columns: Sequence[str]) -> Counter[str]:
    """Return the number of rows with a value in each column that is not one of ``columns``."""
    with open_parquet(path) as file:
        others = [name for name in file.schema_arrow.names if name not in columns]
        return +Counter({name: file.metadata.num_rows - _nulls(file, name) for name in others})


def _nulls(file: Any, name: str) -> int:
    """Return the number of nulls in a Parquet column: from the file's statistics or, without them, by reading it."""
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    # A nested column has the path of its leaves, and their statistics do not tell a null from an empty list.
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    found = [chunk.statistics for chunk in chunks if chunk.path_in_schema == name]
    if len(found) == len(groups) and all(counts is not None and counts.has_null_count for counts in found):
        return sum(counts.null_count for counts in found)
    return sum(batch.column(0).null_count for batch in file.iter_batches(columns=[name]))


def _batch_rows(batch: Any, path: Path, rows_before: int, flag: str) -> list[dict[str, Any]]:
    """Convert one Arrow batch to dictionaries; if text is not valid UTF-8, report the row that holds it."""
    try:
        result: list[dict[str, Any]] = batch.to_pylist()
        return result
    except UnicodeDecodeError:
        for offset in range(batch.num_rows):
            try:
                batch.slice(offset, 1).to_pylist()
            except UnicodeDecodeError as error:
                location = where(path, rows_before + offset + 1)
                fail(flag, location, f"is not valid UTF-8 ({error.reason}); write the column as UTF-8 text")
        raise


def where(path: Path, number: int) -> str:
    """Return file and row for error texts: ``<file> line 17`` (JSONL) or ``<file> row 17`` (Parquet)."""
    return f"{path} {'row' if path.suffix.lower() == '.parquet' else 'line'} {number}"


def shown(value: Any) -> str:
    """Return ``value`` as one short line for error texts."""
    return one_line(repr(value), limit=40)


def one_line(text: str, *, limit: int = 160) -> str:
    """Return ``text`` without line breaks, cut to at most ``limit`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def fail(flag: str, where: str, problem: str) -> NoReturn:
    """Raise the error ``<flag>: <where> <problem>``, where ``where`` names a file or one of its rows.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(f"{flag}: {where} {problem}") from None
