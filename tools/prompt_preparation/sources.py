"""Rows of a data set, streamed: local JSON lines, JSON and Parquet files, or a data set of the Hugging Face hub.

    for row in open_rows("data/", flag="--source", columns=["question"], optional=["id"], split="train"):
        print(row.where, row.values["question"])

The choice made: local files are read here, not through ``datasets``: a broken byte, a damaged file or a missing column
is then reported with its file and row, nothing is copied into a cache, and memory is that of some rows. ``datasets``
opens what has a name on the hub ("owner/name"), in streaming mode, at a commit that is looked up first, so that the
manifest can name it. Every problem of a source is a ConfigurationError in one line that begins with the flag.
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
        values: the columns asked for; of the optional ones those that the row has.
        where: the place for messages: ``<file> line 17``, ``<file> row 17`` or ``<name> <split> row 17``.
        id: identity of the row inside the source: ``<file>:<row>``, ``<split>:<row>``, rows counted from 1.
    """

    values: dict[str, Any]
    where: str
    id: str


@dataclass(frozen=True, slots=True)
class _Asked:
    """What :func:`open_rows` was asked for."""

    flag: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    progress: str | None = None
    may_be_empty: bool = False


class RowSource(abc.ABC):
    """An iterable of :class:`Row` that streams; iterating again starts again."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """For the manifest: source, revision, split and files. Local files are read once more for their SHA-256."""

    @abc.abstractmethod
    def parts(self) -> Sequence["RowSource"]:
        """The files, or the hub's shards, as sources of their own, in the order of iteration; one may be empty."""

    @property
    def total(self) -> int | None:
        """Number of rows where it is known without reading them."""
        return None

    @abc.abstractmethod
    def _rows(self) -> Iterator[Row]:
        """The rows, without a progress bar."""

    @abc.abstractmethod
    def _name(self) -> str:
        """What a message calls the source."""

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
        """Project ``values`` on the columns; one that is missing is an error of the row."""
        if not isinstance(values, dict):
            fail(self._asked.flag, where, f"is {one_line(repr(values), limit=40)}; each row must be an object")
        if any(column not in values for column in self._asked.columns):
            check_columns(values, self._asked.columns, where, self._asked.flag)
        names = (*self._asked.columns, *(column for column in self._asked.optional if column in values))
        return Row({name: values[name] for name in names}, where, identity)


class FileRows(RowSource):
    """Rows of local files, in the order given. ``root``: what the names of the files are relative to."""

    def __init__(self, asked: _Asked, source: str, paths: Sequence[Path], root: Path, split: str | None) -> None:
        super().__init__(asked)
        self.paths, self.root = list(paths), root
        self._source, self._split = source, split
        for path in self.paths:
            check_columns(columns_of(path, asked.flag), asked.columns, str(path), asked.flag)

    def describe(self) -> dict[str, Any]:
        return {"source": self._source, "revision": None, "split": self._split, "files": self._files}

    @cached_property
    def _files(self) -> list[dict[str, Any]]:
        return [{"name": self._relative(path), **fingerprint(path, self._asked.flag)} for path in self.paths]

    def parts(self) -> Sequence["FileRows"]:
        quiet = _Asked(self._asked.flag, self._asked.columns, self._asked.optional, may_be_empty=True)
        return [FileRows(quiet, self._source, [path], self.root, self._split) for path in self.paths]

    @property
    def total(self) -> int | None:
        counts = [row_count(path) for path in self.paths]
        return None if None in counts else sum(count or 0 for count in counts)

    def _name(self) -> str:
        return self._source if len(self.paths) > 1 else str(self.paths[0])

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _rows(self) -> Iterator[Row]:
        wanted = (*self._asked.columns, *self._asked.optional)
        for path in self.paths:
            name = self._relative(path)
            for where, number, values in READERS[path.suffix.lower()](path, self._asked.flag, wanted):
                yield self._row(values, where, f"{name}:{number}")


class HubRows(RowSource):
    """Rows of one split of a data set of the hub, streamed; ``stream`` is a ``datasets.IterableDataset``."""

    def __init__(self, asked: _Asked, stream: Any, described: dict[str, Any], label: str) -> None:
        super().__init__(asked)
        self._stream, self._described, self._label = stream, described, label

    def describe(self) -> dict[str, Any]:
        return dict(self._described)

    def parts(self) -> Sequence["HubRows"]:
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
            except Exception as error:  # whatever the network, the file system and the decoder throw
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
    """Open a data set and check its columns; no row is read but what that takes.

    Args:
        source: a file, a folder (with what lies in it at any depth) or a glob pattern of .jsonl, .json (one list of
            objects, or JSON lines) and .parquet files, or ``owner/name`` on the hub.
        flag: the flag that named it; every error begins with it.
        columns: columns that every row must have.
        optional: columns that are handed out where they are.
        split: of the hub's data set (default there: train). In a folder it picks the files whose names, or whose
            folder's name, begin with it; where no name begins with any usual split, all files are taken.
        name: the hub data set's configuration.
        revision: branch, tag or commit of the hub's data set.
        progress: title of a progress bar with rows a second on stderr; None for no bar.
        prefixes: the beginnings of file names that stand for ``split``, one of which must be there (default: the
            split's own name).

    Errors: ConfigurationError that names flag, file and row; what is found out while rows are read is raised then.
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
    """Sorted files of a file, folder or pattern, and the folder that their names are relative to; None: a hub's name.

    Errors: ConfigurationError when nothing is there.
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
    else:
        fail(flag, source, "does not exist; name a file, a folder, a pattern, or a data set as owner/name")
    paths = sorted(file for file in found if file.is_file() and file.suffix.lower() in READERS)
    paths = [file for file in paths if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not paths:
        fail(flag, source, "holds no .jsonl, .json or .parquet file")
    return paths, root


def check_columns(found: Sequence[str] | dict[str, Any], expected: Sequence[str], where: str, flag: str) -> None:
    """Raise ConfigurationError with the found and the expected names unless all are there."""
    missing = [column for column in expected if column not in found]
    if missing:
        names = one_line(", ".join(found), limit=300) or "none"
        fail(flag, where, f"lacks the column(s) {', '.join(missing)}; found: {names}; expected: {', '.join(expected)}")


def fingerprint(path: Path, flag: str) -> dict[str, Any]:
    """``bytes`` and ``sha256`` of a file. Errors: ConfigurationError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        fail(flag, str(path), f"cannot be read ({error.strerror})")


def show_progress(rows: Iterator[Row], title: str, total: int | None) -> Iterator[Row]:
    """Hand rows on under a progress bar on stderr; a file of a batch job gets a line every half minute."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(rows, desc=title, total=total, unit=" rows", unit_scale=True, mininterval=interval) as bar:
        yield from bar


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that ``revision`` (None: the default branch) of a hub data set stands for now."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha


def load_stream(name: str, configuration: str | None, split: str, revision: str | None) -> Any:
    """One split of a hub data set as a ``datasets.IterableDataset``."""
    from datasets import load_dataset

    return load_dataset(name, configuration, split=split, streaming=True, revision=revision)


def _open_hub(asked: _Asked, source: str, *, name: str | None, split: str, revision: str | None) -> HubRows:
    """Look up the commit, open the stream at it, check the columns."""
    try:
        commit = hub_commit(source, revision)
        stream = load_stream(source, name, split, commit)
        found = stream.column_names or list(next(iter(stream), {}))
    except Exception as error:  # the hub's client, the network, a split or configuration that is not there
        at = f" at {revision}" if revision else ""
        fail(asked.flag, f"{source} ({split}{at})", f"cannot be opened on the Hugging Face hub ({_reason(error)})")
    described: dict[str, Any] = {
        "source": source,
        "configuration": name,
        "revision": commit,
        "split": split,
        "files": [],
    }
    if found:  # a split without rows is reported as that
        check_columns(found, asked.columns, f"{source} {split}", asked.flag)
    if stream.column_names:
        stream = stream.select_columns([column for column in found if column in (*asked.columns, *asked.optional)])
    return HubRows(asked, stream, described, split)


def _files_of_split(
    paths: Sequence[Path], root: Path, split: str, prefixes: Sequence[str] | None, source: str, flag: str
) -> list[Path]:
    """The files of a split, by the usual names of files: ``train-00000-of-00002.parquet``, ``train/a.jsonl``."""

    def begins(path: Path, names: Sequence[str]) -> bool:
        pattern = re.compile(rf"({'|'.join(map(re.escape, names))})([-_.].*)?$")
        return any(pattern.match(part) for part in path.relative_to(root).parts)

    chosen = [path for path in paths if begins(path, prefixes or (split,))]
    if not chosen and (prefixes or any(begins(path, _SPLIT_NAMES) for path in paths)):
        names = ", ".join(path.relative_to(root).as_posix() for path in paths)
        fail(flag, source, f"has no file of the split {split}; found: {one_line(names)}")
    return chosen or list(paths)


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
