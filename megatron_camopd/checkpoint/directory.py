"""Megatron checkpoint directories, and which checkpoint in one is the newest complete one.

A directory holds ``iter_NNNNNNN/`` or ``release/`` folders and ``latest_checkpointed_iteration.txt``, the
tracker. Megatron writes the tracker after everything else, so a checkpoint that was interrupted while being
written is never the one it names. Should the tracker itself be cut short, the newest complete folder counts.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_camopd.checkpoint.checksums import hash_files, read_checksums
from megatron_camopd.errors import ConfigurationError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


@dataclass(frozen=True)
class CheckpointLocation:
    """``directory`` as given to ``--load``; ``iteration`` completed steps, None for a converter's release."""

    directory: Path
    iteration: int | None

    @property
    def folder(self) -> Path:
        """The folder of this checkpoint: ``release`` or ``iter_NNNNNNN``."""
        name = RELEASE if self.iteration is None else f"iter_{self.iteration:07d}"
        return self.directory / name

    @property
    def complete(self) -> bool:
        """Whether all of it was written: torch_dist writes ``.metadata`` last."""
        return _is_complete(self.folder)

    def fingerprint(self) -> str:
        """Return a SHA-256 in hex over all bytes of the checkpoint, which tells it from others wherever it lies.

        It is that of the checksums which the checkpoint states, and which are verified before it is loaded. The files
        of one that states none are hashed here, which takes a second for about 2 GB and each core.

        Raises:
            ConfigurationError: the files or their checksums cannot be read.
        """
        try:
            digests = read_checksums(self.folder)
            if digests is None:
                digests = hash_files(path for path in sorted(self.folder.iterdir()) if path.is_file())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{self.folder}: cannot be read ({error}); it is damaged") from error
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def find_checkpoint(directory: str | os.PathLike[str], *, without: Collection[int] = ()) -> CheckpointLocation | None:
    """Return the newest complete checkpoint in ``directory``; None if there is none (or no such directory).

    That is the one that the tracker names; if the tracker is missing or damaged, or what it names is incomplete, it is
    the newest other one. If iterations are to be passed over, ``without``, it is the newest before all of them.
    """
    root = Path(directory)
    named = _named_by(root / TRACKER)
    release = CheckpointLocation(root, None)
    if named == RELEASE and release.complete:
        return release
    if _is_iteration(named) and not without and (found := CheckpointLocation(root, int(named))).complete:
        return found
    complete = [number for number in complete_iterations(root) if not without or number < min(without)]
    if complete:
        return CheckpointLocation(root, complete[-1])
    return release if release.complete and not without else None


def complete_iterations(directory: str | os.PathLike[str]) -> list[int]:
    """Return the numbers of the complete ``iter_NNNNNNN`` checkpoints in ``directory``, in ascending order."""
    root = Path(directory)
    if not root.is_dir():
        return []
    names = [re.fullmatch(r"iter_(\d{7,18})", entry.name) for entry in root.iterdir()]
    numbers = sorted(int(name[1]) for name in names if name is not None)
    return [number for number in numbers if CheckpointLocation(root, number).complete]


def require_checkpoint(flag: str, directory: str | os.PathLike[str]) -> CheckpointLocation:
    """Return the newest complete checkpoint in ``directory``.

    Raises:
        ConfigurationError: there is none; the line says what ``flag`` should have been given.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ConfigurationError(f"{flag} {root}: no such folder; expected a Megatron checkpoint directory")
    found = find_checkpoint(root)
    if found is None:
        hint = (
            "this looks like a Hugging Face folder; convert it with checkpoints_convert/hf_to_megatron.py first"
            if (root / "config.json").is_file()
            else f"expected {TRACKER} and the folder it names"
        )
        raise ConfigurationError(f"{flag} {root}: holds no complete Megatron checkpoint; {hint}")
    wanted = _name_of(found)
    if _named_by(root / TRACKER) != wanted:
        raise ConfigurationError(
            f"{flag} {root}: {TRACKER} says {_named_by(root / TRACKER)!r}, but the newest complete checkpoint is "
            f"{found.folder.name}; write {wanted} into the file"
        )
    return found


def repair_tracker(location: CheckpointLocation) -> None:
    """Make the tracker name ``location``; one process calls it, which holds the lock of the directory."""
    tracker = location.directory / TRACKER
    if _named_by(tracker) != _name_of(location):
        partial = tracker.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(_name_of(location))
        os.replace(partial, tracker)


def _named_by(tracker: Path) -> str:
    """Return what the tracker names; empty if it is missing or unreadable."""
    try:
        return tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    except OSError:
        return ""


def _is_iteration(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def _name_of(location: CheckpointLocation) -> str:
    """Return the tracker's content that names ``location``."""
    return RELEASE if location.iteration is None else str(location.iteration)


def _is_complete(folder: Path) -> bool:
    """Whether all of a checkpoint was written: torch_dist writes ``.metadata`` last."""
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()
