"""Rows of a data set, streamed: local JSON lines, JSON and Parquet files, or a data set of the Hugging Face hub.

    for row in open_rows("data/", flag="--source", columns=["question"], optional=["id"], split="train"):
        print(row.where, row.values["question"])

Local files are read here, not through ``datasets``: so an invalid byte, a damaged file or a missing column is reported
with its file and row, nothing is copied into a cache, and only a few rows are in memory. A name on the hub
("owner/name") is opened by ``datasets`` in streaming mode, at a commit that is looked up first, so that the manifest
can name it. Every problem of a source raises ConfigurationError with one line that begins with the flag.
"""

import abc
import glob
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_camopd.data.row_files import fail, one_line
from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.files import READERS, columns_of, row_count

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        values: The columns asked for, and those of the optional columns that the row has.
        where: Place for messages: ``<file> line 17``, ``<file> row 17`` or ``<name> <split> row 17``.
        id: Identity of the row inside the source: ``<file>:<row>`` or ``<split>:<row>``, rows counted from 1.
    """

    values: dict[str, Any]
    where: str
    id: str


@dataclass(frozen=True, slots=True)
class _Asked:
    """Arguments of :func:`open_rows`, and whether the source may be empty."""

    flag: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    progress: str | None = None
    may_be_empty: bool = False


class RowSource(abc.ABC):
    """Stream of :class:`Row`; each iteration starts at the first row."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return source, revision, split and files for the manifest; reads local files for their SHA-256."""

    @abc.abstractmethod
    def parts(self) -> Sequence["RowSource"]:
        """Return the files, or the hub's shards, as sources of their own, in iteration order; each may be empty."""

    @property
    def total(self) -> int | None:
        """Number of rows if it is known without reading them, else None."""
        return None

    @abc.abstractmethod
    def _rows(self) -> Iterator[Row]:
        """Yield the rows, without a progress bar."""

    @abc.abstractmethod
    def _name(self) -> str:
        """Return the name of the source for messages."""

    def __iter__(self) -> Iterator[Row]:
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            if self._asked.may_be_empty:
                return rows
            fail(self._asked.flag, self._name(), "has no rows; it must hold at least one")
        rows = itertools.chain([first], rows)
        return rows if self._asked.progress is None else show_progress(rows, self._asked.progress, self.total)

    def _row(self, values: Any, where: str, identity: str) -> Row:
        """Make a row of the columns in ``values``; raise ConfigurationError if one is missing."""
        if not isinstance(values, dict):
            fail(self._asked.flag, where, f"is {one_line(repr(values), limit=40)}; each row must be an object")
        if any(column not in values for column in self._asked.columns):
            check_columns(values, self._asked.columns, where, self._asked.flag)
        names = (*self._asked.columns, *(column for column in self._asked.optional if column in values))
        return Row({name: values[name] for name in names}, where, identity)


class FileRows(RowSource):
    """Rows of local files, in the order given; file names in ids and the manifest are relative to ``root``."""

    def __init__(self, asked: _Asked, source: str, paths: Sequence[Path], root: Path, split: str | None) -> None:
        super().__init__(asked)
        self.paths, self.root = list(paths), root
        self._source, self._split = source, split
        for path in self.paths:
            check_columns(columns_of(path, asked.flag), asked.columns, str(path), asked.flag)

    def describe(self) -> dict[str, Any]:
        """Return the description for the manifest."""
        return {"source": self._source, "revision": None, "split": self._split, "files": self._files}

    @cached_property
    def _files(self) -> list[dict[str, Any]]:
        return [{"name": self._relative(path), **fingerprint(path, self._asked.flag)} for path in self.paths]

    def parts(self) -> Sequence["FileRows"]:
        """Return each file as a source of its own."""
        quiet = _Asked(self._asked.flag, self._asked.columns, self._asked.optional, may_be_empty=True)
        return [FileRows(quiet, self._source, [path], self.root, self._split) for path in self.paths]

    @property
    def total(self) -> int | None:
        """Number of rows if all files are Parquet, else None."""
        counts = [row_count(path) for path in self.paths]
        return None if None in counts else sum(count or 0 for count in counts)

    def _name(self) -> str:
        return self._source if len(self.paths) > 1 else str(self.paths[0])

    def _relative(self, path: Path) -> str:
        """Return the file's path below ``root``."""
        return path.relative_to(self.root).as_posix()

    def _rows(self) -> Iterator[Row]:
        wanted = (*self._asked.columns, *self._asked.optional)
        for path in self.paths:
            name = self._relative(path)
            for where, number, values in READERS[path.suffix.lower()](path, self._asked.flag, wanted):
                yield self._row(values, where, f"{name}:{number}")


class HubRows(RowSource):
    """Rows of one split of a data set on the hub; ``stream`` is a ``datasets.IterableDataset``."""

    def __init__(self, asked: _Asked, stream: Any, described: dict[str, Any], label: str) -> None:
        super().__init__(asked)
        self._stream, self._described, self._label = stream, described, label

    def describe(self) -> dict[str, Any]:
        """Return the description for the manifest."""
        return dict(self._described)

    def parts(self) -> Sequence["HubRows"]:
        """Return each shard as a source of its own."""
        quiet = _Asked(self._asked.flag, self._asked.columns, self._asked.optional, may_be_empty=True)
        count = self._stream.num_shards
        shards = [self._stream.shard(num_shards=count, index=index) for index in range(count)]
        split = self._described["split"]
        return [
            HubRows(quiet, shard, {**self._described, "shard": f"{index + 1} of {count}"}, f"{split}/{index + 1}")
            for index, shard in enumerate(shards)
        ]

    def _name(self) -> str:
        return f"{self._described['source']} {self._label}"

    def _rows(self) -> Iterator[Row]:
        rows = iter(self._stream)
        for number in itertools.count(1):
            where = f"{self._name()} row {number}"
            try:
                values = next(rows, None)
            except Exception as error:  # the network, the file system and the decoder raise errors of many types
                fail(self._asked.flag, where, f"could not be read ({_reason(error)}); start again when it can be")
            if values is None:
                return
            yield self._row(values, where, f"{self._label}:{number}")


def open_rows(
    source: str,
    *,
    flag: str,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    progress: str | None = None,
    prefixes: Sequence[str] | None = None,
) -> RowSource:
    """Open a data set and check its columns, reading at most the first row of each file.

    Args:
        source: A file, a folder (with the files in it at any depth) or a glob pattern of .jsonl, .json (one list of
            objects, or JSON lines) and .parquet files, or ``owner/name`` on the hub.
        flag: The flag that named the source; every error begins with it.
        columns: Columns that every row must have.
        optional: Columns that are read where a row has them.
        split: Split of the hub's data set (default there: train). In a folder it selects the files whose names, or
            whose folder's name, begin with it; if no name begins with any usual split, all files are taken.
        name: Configuration of the hub's data set.
        revision: Branch, tag or commit of the hub's data set.
        progress: Title of a progress bar on stderr that shows rows per second; None for no bar.
        prefixes: Beginnings of file names that stand for ``split``; a file with one of them must exist (default: the
            split's own name).

    Raises:
        ConfigurationError: The source is missing or wrong; the message names flag, file and row. Errors in later rows
            are raised when those rows are read.
    """
    asked = _Asked(flag, tuple(columns), tuple(optional), progress)
    paths, root = local_files(source, flag)
    if paths is None:
        return _open_hub(asked, source, name=name, split=split or "train", revision=revision)
    if revision is not None:
        raise ConfigurationError(f"--revision {revision}: {source} is a local {flag}; only the hub has revisions")
    if split is not None and (prefixes or len(paths) > 1):
        paths = _files_of_split(paths, root, split, prefixes, source, flag)
    return FileRows(asked, source, paths, root, split)


def local_files(source: str, flag: str) -> tuple[list[Path] | None, Path]:
    """Find the files of a file, folder or pattern.

    Returns:
        The sorted files (None if ``source`` is a name on the hub), and the folder that their names are relative to.

    Raises:
        ConfigurationError: There is no such file, or none with a known extension.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            fail(flag, source, f"has the extension {path.suffix!r}; expected .jsonl, .json or .parquet")
        return [path], path.parent
    if path.is_dir():
        found, root = list(path.rglob("*")), path
    elif glob.has_magic(source):
        found = [Path(match) for match in glob.glob(source, recursive=True)]
        root = Path(os.path.commonpath([match.parent for match in found])) if found else Path()
    elif HUB_NAME.fullmatch(source) and path.suffix.lower() not in READERS and not path.parent.exists():
        return None, Path()
    elif path.exists():
        fail(flag, source, "is no regular file; name a file, a folder, a pattern, or a data set as owner/name")
    else:
        fail(flag, source, "does not exist; name a file, a folder, a pattern, or a data set as owner/name")
    paths = sorted(file for file in found if file.is_file() and file.suffix.lower() in READERS)
    paths = [file for file in paths if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not paths:
        fail(flag, source, "holds no .jsonl, .json or .parquet file")
    return paths, root


def check_columns(found: Sequence[str] | dict[str, Any], expected: Sequence[str], where: str, flag: str) -> None:
    """Check that all ``expected`` columns are in ``found``.

    Raises:
        ConfigurationError: A column is missing; the message has the found and the expected names.
    """
    missing = [column for column in expected if column not in found]
    if missing:
        names = one_line(", ".join(found), limit=300) or "none"
        fail(flag, where, f"lacks the column(s) {', '.join(missing)}; found: {names}; expected: {', '.join(expected)}")


def fingerprint(path: Path, flag: str) -> dict[str, Any]:
    """Return ``bytes`` and ``sha256`` of a file.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        fail(flag, str(path), f"cannot be read ({error.strerror})")


def show_progress(rows: Iterator[Row], title: str, total: int | None) -> Iterator[Row]:
    """Yield the rows and show a progress bar on stderr, updated every 30 s if stderr is not a terminal."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(rows, desc=title, total=total, unit=" rows", unit_scale=True, mininterval=interval) as bar:
        yield from bar


def hub_commit(name: str, revision: str | None) -> str | None:
    """Look up the commit that ``revision`` (None: the default branch) of a hub data set stands for now."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha


def load_stream(name: str, configuration: str | None, split: str, revision: str | None) -> Any:
    """Open one split of a hub data set as a ``datasets.IterableDataset``."""
    from datasets import load_dataset

    return load_dataset(name, configuration, split=split, streaming=True, revision=revision)


def _open_hub(asked: _Asked, source: str, *, name: str | None, split: str, revision: str | None) -> HubRows:
    """Look up the commit, open the stream at it, check the columns."""
    try:
        commit = hub_commit(source, revision)
        stream = load_stream(source, name, split, commit)
        found = stream.column_names or list(next(iter(stream), {}))
    except Exception as error:  # many types: the hub's client, the network, an unknown split or configuration
        at = f" at {revision}" if revision else ""
        fail(asked.flag, f"{source} ({split}{at})", f"cannot be opened on the Hugging Face hub ({_reason(error)})")
    described: dict[str, Any] = {
        "source": source,
        "configuration": name,
        "revision": commit,
        "split": split,
        "files": [],
    }
    if found:  # without rows there are no columns to check; iteration reports an empty split
        check_columns(found, asked.columns, f"{source} {split}", asked.flag)
    if stream.column_names:
        stream = stream.select_columns([column for column in found if column in (*asked.columns, *asked.optional)])
    return HubRows(asked, stream, described, split)


def _files_of_split(
    paths: Sequence[Path], root: Path, split: str, prefixes: Sequence[str] | None, source: str, flag: str
) -> list[Path]:
    """Select the files of a split by the usual file names: ``train-00000-of-00002.parquet``, ``train/a.jsonl``."""

    def begins(path: Path, names: Sequence[str]) -> bool:
        pattern = re.compile(rf"({'|'.join(map(re.escape, names))})([-_.].*)?$")
        return any(pattern.match(part) for part in path.relative_to(root).parts)

    chosen = [path for path in paths if begins(path, prefixes or (split,))]
    if not chosen and (prefixes or any(begins(path, _SPLIT_NAMES) for path in paths)):
        names = ", ".join(path.relative_to(root).as_posix() for path in paths)
        fail(flag, source, f"has no file of the split {split}; found: {one_line(names)}")
    return chosen or list(paths)


def _reason(error: Exception) -> str:
    """Return the error's type and message in one line."""
    return one_line(f"{type(error).__name__}: {error}")
