"""A set of JSONL files and their manifest.json, written together or not at all.

    with OutputSet(folder, overwrite=args.overwrite) as output:
        if output.is_current(identity):                  # the folder has the output of the same settings and inputs
            return output.manifest
        output.write_rows("prompts.jsonl", rows)
        return output.finish({"counts": counts})

Files are written under temporary names beside the final ones and renamed at the end, manifest.json last: a folder with
a manifest is complete. The bytes depend on rows and settings alone; they contain no time. Prompt files are read by the
trainer's own reader before they get their names.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_camopd.config.program import cleaned_up
from megatron_camopd.config.words import check_file
from megatron_camopd.data import read_prompts
from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.sources import fingerprint

MANIFEST = "manifest.json"
_TEMPORARY = ".partial."


class OutputSet:
    """The output of one command, a context manager; when it is left by an exception, no file has its final name.

    Args:
        folder: Folder of the output; made if it does not exist.
        flag: The flag that named it, for messages.
        overwrite: Replace an output that other settings or inputs made.

    Attributes:
        manifest: The manifest of a current output, or the one that :meth:`finish` wrote.
    """

    def __init__(self, folder: Path, *, flag: str = "--output", overwrite: bool = False) -> None:
        self.folder, self.manifest = folder, {}  # type: Path, dict[str, Any]
        self._flag, self._overwrite = flag, overwrite
        self._identity: dict[str, Any] | None = None
        self._old: dict[str, Any] | None = None
        self._written: dict[str, dict[str, Any]] = {}
        self._made: list[Path] = []
        self._cleaning = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._cleaning.enter_context(cleaned_up(self._clean))
        try:
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise ConfigurationError(f"{self._flag}: {self.folder} cannot be written; name a folder of yours")
            self._old = self._old_manifest()
        except OSError as error:
            self._cleaning.close()
            raise ConfigurationError(f"{self._flag}: {self.folder} cannot be used ({error.strerror})") from None
        except BaseException:
            self._cleaning.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleaning.close()

    def _clean(self) -> None:
        """Remove the files that have no final name yet, and the folders that were made for nothing."""
        for name in self._written:
            self._temporary(name).unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # it holds the output
                folder.rmdir()

    def is_current(self, identity: dict[str, Any]) -> bool:
        """Return whether the folder already has the output of ``identity``: settings and inputs, as JSON values.

        :meth:`finish` writes ``identity`` to the manifest.

        Raises:
            ConfigurationError: The folder has another output, or files that were changed since, and is not to be
                overwritten.
        """
        self._identity = json.loads(json.dumps(identity))
        if self._old is None:
            return False
        if self._old.get("made_from") == self._identity:
            changed = [name for name, file in self._old.get("files", {}).items() if not self._is_unchanged(name, file)]
            if not changed:
                self.manifest = self._old
                return True
            found = f"{changed[0]} is not as {MANIFEST} says"
        else:
            found = "holds an output made with other settings or from other inputs"
        if self._overwrite:
            return False
        raise ConfigurationError(f"{self._flag}: {self.folder} {found}; name another folder or give --overwrite")

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]], *, prompts: bool = True) -> None:
        """Write one JSONL file, keys in the order given.

        Args:
            name: Name of the file.
            rows: Its rows.
            prompts: Check the file with the trainer's reader of prompt files.

        Raises:
            ConfigurationError: The file cannot be written, or a row cannot be encoded or is not a prompt.
        """
        assert name not in self._written and name.endswith(".jsonl")
        if self._identity is None:
            self._refuse_other()
        digest, size, count = hashlib.sha256(), 0, 0
        path = self._temporary(name)
        self._written[name] = {}
        with self._open(path) as file:
            for row in rows:
                try:
                    line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
                except UnicodeEncodeError as error:
                    raise ConfigurationError(f"{self._flag}: row {row.get('id')} is no text ({error.reason})") from None
                digest.update(line)
                size, count = size + len(line), count + 1
                self._put(file, line, path)
            self._sync(file, path)
        if prompts:
            read_prompts([path], flag=f"{self._flag} {name}")
        self._written[name] = {"rows": count, "bytes": size, "sha256": digest.hexdigest()}

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Give all files their final names, write the manifest last, and return it.

        ``made_from`` (the identity given to :meth:`is_current`) and ``files`` (rows, bytes and SHA-256 of each) are
        added to ``manifest``.
        """
        assert self._written and not {"made_from", "files"} & set(manifest)
        self.manifest = {**manifest, "made_from": self._identity, "files": dict(self._written)}
        for name, file in self._written.items():
            path = self.folder / name
            taken = path.exists() and self._old is None and not self._is_unchanged(name, file)
            if taken and not self._overwrite:
                raise ConfigurationError(f"{self._flag}: {path} exists already; name another folder or --overwrite")
        temporary = self._temporary(MANIFEST)
        self._written[MANIFEST] = {}
        text = json.dumps(self.manifest, ensure_ascii=False, indent=2) + "\n"
        with self._open(temporary) as file:
            self._put(file, text.encode("utf-8"), temporary)
            self._sync(file, temporary)
        try:
            (self.folder / MANIFEST).unlink(missing_ok=True)  # from here on the old output is incomplete
            for name in (self._old or {}).get("files", {}):
                if name not in self._written and Path(name).name == name and "\0" not in name:
                    (self.folder / name).unlink(missing_ok=True)
            for name in self._written:  # the manifest was added last
                self._temporary(name).replace(self.folder / name)
        except OSError as error:
            raise ConfigurationError(f"{self._flag}: {self.folder} cannot be written ({error.strerror})") from None
        return self.manifest

    def _old_manifest(self) -> dict[str, Any] | None:
        """Read the manifest that the folder has; None if there is none, {} for a broken one to be overwritten."""
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        check_file(self._flag, path, "the manifest of an output")
        try:
            found = json.loads(path.read_bytes())
            if isinstance(found, dict) and isinstance(found.get("files", {}), dict):
                return found
        except (ValueError, RecursionError):
            pass
        if self._overwrite:
            return {}
        raise ConfigurationError(f"{self._flag}: {path} is no manifest; name another folder or give --overwrite")

    def _refuse_other(self) -> None:
        """Raise ConfigurationError if the folder has an output and is not to be overwritten."""
        if self._old is not None and not self._overwrite:
            raise ConfigurationError(
                f"{self._flag}: {self.folder} holds an output; name another folder or give --overwrite"
            )

    def _is_unchanged(self, name: str, file: Any) -> bool:
        """Return whether a file has the size and hash of its manifest entry."""
        path = self.folder / name
        if not path.is_file() or not isinstance(file, dict):
            return False
        found = fingerprint(path, self._flag)
        return all(found[key] == file.get(key) for key in found)

    def _temporary(self, name: str) -> Path:
        """Return the temporary path of a file."""
        return self.folder / (_TEMPORARY + name)

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        """Open a file for writing and close it; an OSError of either becomes a ConfigurationError."""
        try:
            path.unlink(missing_ok=True)  # should it be a FIFO, opening it would never end
            file = path.open("wb")
        except OSError as error:
            raise ConfigurationError(f"{self._flag}: {path} cannot be written ({error.strerror})") from None
        try:
            yield file
        finally:
            try:
                file.close()  # writes what is left
            except OSError as error:
                raise ConfigurationError(f"{self._flag}: {path} cannot be written ({error.strerror})") from None

    def _put(self, file: Any, data: bytes, path: Path) -> None:
        """Write to a file; an OSError becomes a ConfigurationError."""
        try:
            file.write(data)
        except OSError as error:  # wraps the write alone: an OSError from reading the rows is not about the output
            raise ConfigurationError(f"{self._flag}: {path} cannot be written ({error.strerror})") from None

    def _sync(self, file: Any, path: Path) -> None:
        """Flush a file to disk; an OSError becomes a ConfigurationError."""
        try:
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise ConfigurationError(f"{self._flag}: {path} cannot be written ({error.strerror})") from None
