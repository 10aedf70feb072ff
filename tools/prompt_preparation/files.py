"""Read local JSON lines, JSON lists and Parquet files row by row, in bounded memory.

A reader takes (path, flag, columns) and yields (place for messages, number of the row from 1, values). A JSON list is
parsed object by object; what is held is one object and a piece of the file. Broken UTF-8, damaged JSON and damaged
Parquet are ConfigurationErrors in one line that names the flag, the file and the line or row.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_camopd.errors import ConfigurationError

Reader = Callable[[Path, str, Sequence[str]], Iterator[tuple[str, int, Any]]]

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")
# Rows of reasoning data have 50 KB and more: a batch stays at some 10 MB.
_PARQUET_BATCH_ROWS = 256
_PARQUET_BUFFER_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20
LARGEST_OBJECT = 1 << 26


def json_line_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Rows of a .jsonl file; blank lines are passed over."""
    with _opened(path, flag) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                values = json.loads(text)
                _check_surrogates(text, values)
            except UnicodeError as error:
                _fail(flag, where, f"is not valid UTF-8 ({_unicode_reason(error)}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                _fail(flag, where, f"is not JSON ({_json_reason(error)}); each line must be one JSON object")
            yield where, number, values


def json_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Rows of a .json file: the objects of its one list, or JSON lines where it begins with no bracket."""
    with _opened(path, flag) as file:
        beginning = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    yield from (_json_list_rows if beginning.startswith(b"[") else json_line_rows)(path, flag, columns)


def _json_list_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    text = _Text(path, flag)
    decode = json.JSONDecoder().raw_decode
    text.skip("[")
    if text.next_character() == "]":
        return
    number = 0
    while True:
        number += 1
        where = f"{path} row {number}"
        if text.next_character() != "{":
            found = text.next_character() or "the end of the file"
            _fail(flag, where, f"begins with {found!r}; the file must be one list of JSON objects")
        while True:
            try:
                values, end = decode(text.held, text.position)
                _check_surrogates(text.held[text.position : end], values)
                break
            except UnicodeError as error:
                _fail(flag, where, f"is not valid UTF-8 ({_unicode_reason(error)}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                # An object that goes on in the next piece looks like a damaged one.
                too_long = len(text.held) - text.position > LARGEST_OBJECT
                if isinstance(error, RecursionError) or too_long or not text.read_more():
                    _fail(flag, where, f"is not JSON ({_json_reason(error)}); the file is damaged or cut off")
        text.position = end
        yield where, number, values
        after = text.next_character()
        if after not in (",", "]"):
            _fail(flag, where, f"is followed by {after or 'the end of the file'!r}; the file is damaged or cut off")
        text.skip(after)
        if after == "]":
            if text.next_character():
                _fail(flag, where, "is the last of the list, but the file goes on; it must be one list")
            return


class _Text:
    """A UTF-8 file read in pieces: ``held`` is the piece in memory, ``position`` where we are in it."""

    def __init__(self, path: Path, flag: str) -> None:
        self.held, self.position = "", 0
        self._path, self._flag = path, flag
        self._pieces = self._decoded()

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        before = 0
        with _opened(self._path, self._flag) as file:
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
        where = f"{self._path} near byte {before + error.start:,}"
        _fail(self._flag, where, f"is not valid UTF-8 ({error.reason}); save the file as UTF-8")

    def read_more(self) -> bool:
        """Drop what lies behind, and at least double what lies ahead; False at the end of the file."""
        ahead = self.held[self.position :]
        pieces, wanted, found = [ahead], max(len(ahead), 1), 0
        while found < wanted and (piece := next(self._pieces, None)) is not None:
            pieces.append(piece)
            found += len(piece)
        self.held, self.position = "".join(pieces), 0
        return found > 0

    def next_character(self) -> str:
        """The next character that is no space, which stays; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.held, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.held):
                return self.held[self.position]
            if not self.read_more():
                return ""

    def skip(self, expected: str) -> None:
        assert self.next_character() == expected
        self.position += 1


def parquet_rows(path: Path, flag: str, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Rows of a .parquet file with those of the columns that it has."""
    import pyarrow

    try:
        with _parquet_file(path) as file:
            present = [column for column in columns if column in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=present):
                for values in _batch_rows(batch, path, number, flag):
                    number += 1
                    yield f"{path} row {number}", number, values
    except (pyarrow.ArrowException, OSError) as error:
        _fail(flag, str(path), f"is not a readable Parquet file ({_one_line(str(error))})")


def _batch_rows(batch: Any, path: Path, rows_before: int, flag: str) -> list[dict[str, Any]]:
    """One Arrow batch as dictionaries; broken UTF-8 is looked for row by row."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for offset in range(batch.num_rows):
            try:
                batch.slice(offset, 1).to_pylist()
            except UnicodeDecodeError as error:
                where = f"{path} row {rows_before + offset + 1}"
                _fail(flag, where, f"is not valid UTF-8 ({error.reason}); write the column as UTF-8 text")
        raise


READERS: dict[str, Reader] = {".jsonl": json_line_rows, ".json": json_rows, ".parquet": parquet_rows}


def columns_of(path: Path, flag: str) -> list[str]:
    """Column names of a Parquet file, or of the first row of a JSON file (all of them where there is no row).

    Errors: ConfigurationError for a file that cannot be read or whose first row is no object.
    """
    if path.suffix.lower() != ".parquet":
        where, _, values = next(READERS[path.suffix.lower()](path, flag, ()), (str(path), 0, {}))
        if not where or not isinstance(values, dict):
            _fail(flag, where, f"is {_one_line(repr(values), limit=40)}; each row must be an object")
        if not values and where == str(path):
            _fail(flag, where, "has no rows; it must hold at least one")
        return list(values)
    import pyarrow

    try:
        with _parquet_file(path) as file:
            return list(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError) as error:
        _fail(flag, str(path), f"is not a readable Parquet file ({_one_line(str(error))})")


def row_count(path: Path) -> int | None:
    """Rows of a Parquet file as its footer says; None for other files."""
    if path.suffix.lower() != ".parquet":
        return None
    with _parquet_file(path) as file:
        return file.metadata.num_rows


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet

    # With a buffer a column is read in pieces; without, whole row groups of it are held in memory.
    return pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)


def _opened(path: Path, flag: str) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        _fail(flag, str(path), f"cannot be read ({error.strerror})")


def _check_surrogates(text: str, values: Any) -> None:
    """Half a surrogate pair is valid JSON but no text: raises UnicodeEncodeError."""
    if _SURROGATE_ESCAPE.search(text):
        json.dumps(values, ensure_ascii=False).encode("utf-8")


def _unicode_reason(error: UnicodeError) -> str:
    return str(getattr(error, "reason", error))


def _json_reason(error: Exception) -> str:
    return f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else _one_line(str(error))


def _one_line(text: str, *, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fail(flag: str, where: str, what: str) -> NoReturn:
    raise ConfigurationError(f"{flag}: {where} {what}") from None
