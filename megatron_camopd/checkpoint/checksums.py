"""SHA-256 of every file of a checkpoint, in the file ``SHA256SUMS`` of its folder.

The format is that of sha256sum(1): ``sha256sum --check SHA256SUMS`` in the folder verifies it without this program.
A checkpoint without the file, made by an earlier version or by another program, is loaded unverified, and a run says
so.
"""

import hashlib
import io
import os
import re
from collections.abc import Buffer, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\n]+)")
_BLOCK_BYTES = 1 << 22
_SMALL_BYTES = 1 << 16
_ALWAYS = (".metadata", "metadata.json")
_DATA = (".distcp", ".pt")
_THREADS = 4


class HashingFile(io.BufferedWriter):
    """A new binary file whose bytes are hashed while they are written: large blocks by a thread, beside the writing.

    What is hashed is what was to be written, so a fault on the way to the disk shows too.

    Args:
        path: The file.
        digests: Takes the SHA-256 in hex, by file name, when the file is closed.
    """

    def __init__(self, path: str | os.PathLike[str], digests: dict[str, str]) -> None:
        super().__init__(io.FileIO(path, "w"), _BLOCK_BYTES)
        self._name, self._digests, self._hash = Path(path).name, digests, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sha256 {self._name}")

    def write(self, data: Buffer, /) -> int:
        """Write and hash ``data``."""
        view = memoryview(data).cast("B")
        if len(view) < _SMALL_BYTES:
            self._hash.update(view)
            return super().write(view)
        hashing = self._thread.submit(self._hash.update, view)  # the data is the caller's again when this returns
        try:
            return super().write(view)
        finally:
            hashing.result()

    def seek(self, target: int, whence: int = 0, /) -> int:
        """Refuse to move: the hash is one of the bytes in the order of writing."""
        raise io.UnsupportedOperation("a file that is hashed while it is written cannot be written out of order")

    def close(self) -> None:
        """Close the file and keep its hash."""
        if not self.closed:
            self._thread.shutdown()
            super().close()
            self._digests[self._name] = self._hash.hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 in hex of each file, by file name; several files at a time.

    Raises:
        OSError: a file cannot be read.
    """
    paths = list(paths)
    with ThreadPoolExecutor(_workers()) as pool:
        return dict(zip((path.name for path in paths), pool.map(_digest, paths), strict=True))


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` of a checkpoint folder; it appears complete or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    partial = folder / f".{SUMS}.partial-{os.getpid()}"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / SUMS)
    finally:
        partial.unlink(missing_ok=True)


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 in hex that a checkpoint folder states, by file name; None if it states none.

    Raises:
        ValueError: ``SHA256SUMS`` is damaged.
        OSError: it cannot be read.
    """
    path = folder / SUMS
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ValueError(f"{SUMS} is no file")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    if not found or None in found:
        raise ValueError(f"{SUMS} has a line that is no SHA-256 and file name")
    return {match[2]: match[1] for match in found if match is not None}


def damaged_files(
    folders: Sequence[Path], *, share: int = 0, shares: int = 1, progress: bool = False
) -> dict[int, str]:
    """Hash one share of the files of several checkpoint folders, and return what is damaged.

    Args:
        folders: folders of checkpoints; those that state no checksums are left out.
        share: which of ``shares`` shares of the files this process hashes.
        shares: number of processes that hash.
        progress: whether to show a progress bar if this takes more than two seconds.

    Returns:
        For each damaged folder, by its place in ``folders``, the first file that is, and why.
    """
    expected: list[tuple[int, Path, str]] = []
    damage: dict[int, str] = {}
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            continue
        try:
            digests = read_checksums(folder)
            if digests is not None:
                _check_complete(folder, digests)
        except (OSError, ValueError) as error:
            damage[place] = f"{folder / SUMS} cannot be read ({error})"
            continue
        expected += [(place, folder / name, digest) for name, digest in sorted((digests or {}).items())]
    mine = expected[share::shares]
    total = sum(_size(path) for _, path, _ in mine)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="checksums", disable=not progress, delay=2) as bar,
        ThreadPoolExecutor(_workers()) as pool,
    ):
        for (place, path, _), reason in zip(mine, pool.map(lambda item: _damage(item[1], item[2]), mine), strict=True):
            if reason is not None:
                damage.setdefault(place, reason)
            bar.update(_size(path))
    return damage


def _check_complete(folder: Path, digests: Mapping[str, str]) -> None:
    """Check that no file of a checkpoint is left out of its checksums.

    Raises:
        ValueError: One is; the text names it.
    """
    found = [path.name for path in folder.iterdir() if path.suffix in _DATA or path.name in _ALWAYS]
    for name in sorted({*found, *_ALWAYS}):
        if name not in digests:
            raise ValueError(f"it has no line for {name}")


def _damage(path: Path, expected: str) -> str | None:
    """Return why a file is damaged, or None."""
    if not path.is_file():  # reading a pipe or a device might never end
        return f"{path} is {'no regular file' if path.exists() else 'missing'}"
    try:
        found = _digest(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None if found == expected else f"{path} is damaged: its SHA-256 is {found[:12]}, {SUMS} says {expected[:12]}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _workers() -> int:
    """Return the number of files to hash at a time: this process's part of the machine, at most four."""
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(_THREADS, (os.cpu_count() or 1) // processes))
