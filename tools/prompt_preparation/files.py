"""Readers of local JSON lines, JSON lists and Parquet files, row by row, in bounded memory.

A reader takes (path, flag, columns) and yields (place for messages, row number from 1, values). A JSON list is parsed
object by object; one object and a piece of the file are in memory at a time. Invalid UTF-8, damaged JSON and damaged
Parquet raise ConfigurationError with one line that names the flag, the file and the line or row.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_camopd.data import row_files
from megatron_camopd.data.json_text import check_surrogates
from megatron_camopd.data.row_files import fail, json_reason, one_line, open_parquet, where

Reader = Callable[[Path, str, Sequence[str]], Iterator[tuple[str, int, Any]]]

_SPACE = re.compile(r"[ \t\r\n]*")
_PIECE_BYTES = 1 << 20
LARGEST_OBJECT = 1 << 26


def json_line_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield the rows of a .jsonl file; blank lines are skipped."""
    with _readable(path, flag):
        for number, _, values in row_files.json_line_rows(path, flag):
            yield where(path, number), number, values


def json_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield the rows of a .json file: the objects of its one list, or JSON lines if it begins with no bracket."""
    with _readable(path, flag), path.open("rb") as file:
        beginning = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    yield from (_json_list_rows if beginning.startswith(b"[") else json_line_rows)(path, flag, columns)


def _json_list_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield the objects of the one list in a .json file."""
    text = _Text(path, flag)
    decode = json.JSONDecoder().raw_decode
    text.skip("[")
    if text.next_character() == "]":
        return
    number = 0
    while True:
        number += 1
        place = f"{path} row {number}"
        if text.next_character() != "{":
            found = text.next_character() or "the end of the file"
            fail(flag, place, f"begins with {found!r}; the file must be one list of JSON objects")
        while True:
            try:
                values, end = decode(text.held, text.position)
                check_surrogates(text.held[text.position : end], values)
                break
            except UnicodeError as error:
                fail(flag, place, f"is not valid UTF-8 ({getattr(error, 'reason', error)}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                # An object that goes on in the next piece looks like a damaged one.
                too_long = len(text.held) - text.position > LARGEST_OBJECT
                if isinstance(error, RecursionError) or too_long or not text.read_more():
                    fail(flag, place, f"is not JSON ({json_reason(error)}); the file is damaged or cut off")
        text.position = end
        yield place, number, values
        after = text.next_character()
        if after not in (",", "]"):
            fail(flag, place, f"is followed by {after or 'the end of the file'!r}; the file is damaged or cut off")
        text.skip(after)
        if after == "]":
            if text.next_character():
                fail(flag, place, "is the last of the list, but the file goes on; it must be one list")
            return


class _Text:
    """A UTF-8 file that is read in pieces: ``held`` is the text in memory, ``position`` the next character in it."""

    def __init__(self, path: Path, flag: str) -> None:
        self.held, self.position = "", 0
        self._path, self._flag = path, flag
        self._pieces = self._decoded()

    def _decoded(self) -> Iterator[str]:
        """Yield the decoded pieces of the file."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        before = 0
        with _readable(self._path, self._flag), self._path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                try:
                    yield decoder.decode(piece)
                except UnicodeDecodeError as error:
                    self._broken(before, error)
                before += len(piece)
            try:
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                self._broken(before, error)

    def _broken(self, before: int, error: UnicodeDecodeError) -> NoReturn:
        """Raise ConfigurationError for invalid UTF-8 in the piece that begins at byte ``before``."""
        where = f"{self._path} near byte {before + error.start:,}"
        fail(self._flag, where, f"is not valid UTF-8 ({error.reason}); save the file as UTF-8")

    def read_more(self) -> bool:
        """Drop the text before ``position``, at least double the text after it; return False at the file's end."""
        ahead = self.held[self.position :]
        pieces, wanted, found = [ahead], max(len(ahead), 1), 0
        while found < wanted and (piece := next(self._pieces, None)) is not None:
            pieces.append(piece)
            found += len(piece)
        self.held, self.position = "".join(pieces), 0
        return found > 0

    def next_character(self) -> str:
        """Skip white space and return the next character without consuming it; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.held, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.held):
                return self.held[self.position]
            if not self.read_more():
                return ""

    def skip(self, expected: str) -> None:
        """Consume the next character, which must be ``expected``."""
        assert self.next_character() == expected
        self.position += 1


def parquet_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield the rows of a .parquet file, with those of ``columns`` that it has."""
    with _readable(path, flag):
        for number, values in row_files.parquet_rows(path, flag, columns):
            yield where(path, number), number, values


READERS: dict[str, Reader] = {".jsonl": json_line_rows, ".json": json_rows, ".parquet": parquet_rows}


def columns_of(path: Path, flag: str) -> list[str]:
    """Return the column names of a Parquet file, or the keys of the first row of a JSON file.

    Raises:
        ConfigurationError: The file cannot be read, or a JSON file has no rows or a first row that is not an object.
    """
    if path.suffix.lower() != ".parquet":
        place, _, values = next(READERS[path.suffix.lower()](path, flag, ()), (str(path), 0, {}))
        if not place or not isinstance(values, dict):
            fail(flag, place, f"is {one_line(repr(values), limit=40)}; each row must be an object")
        if not values and place == str(path):
            fail(flag, place, "has no rows; it must hold at least one")
        return list(values)
    import pyarrow

    try:
        with open_parquet(path) as file:
            return list(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError) as error:
        fail(flag, str(path), f"is not a readable Parquet file ({one_line(str(error))})")


def row_count(path: Path) -> int | None:
    """Return the number of rows from a Parquet file's footer; None for other files."""
    if path.suffix.lower() != ".parquet":
        return None
    with open_parquet(path) as file:
        return file.metadata.num_rows


@contextlib.contextmanager
def _readable(path: Path, flag: str) -> Iterator[None]:
    """Turn an OSError inside the context into a ConfigurationError."""
    try:
        yield
    except OSError as error:
        fail(flag, str(path), f"cannot be read ({error.strerror or one_line(str(error))})")
