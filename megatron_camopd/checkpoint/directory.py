"""Megatron checkpoint directories, and which checkpoint in one is the newest complete one.

A directory holds ``iter_NNNNNNN/`` or ``release/`` folders and ``latest_checkpointed_iteration.txt``, the
tracker. Megatron writes the tracker after everything else, so a checkpoint that was interrupted while being
written is never the one it names. Should the tracker itself be cut short, the newest complete folder counts.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_camopd.errors import ConfigurationError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_SAMPLE_BYTES = 64 * 1024


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
        """Return a SHA-256 in hex that tells this checkpoint from another one, wherever it lies.

        Of the index, and of size, beginning and end of every data file: reading all of a large model would take
        minutes, and weights that differ do not agree in these places.
        """
        digest = hashlib.sha256((self.folder / ".metadata").read_bytes())
        for path in sorted(self.folder.glob("*.distcp")):
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{path.name} {size} ".encode())
                for offset in (0, max(0, size - _SAMPLE_BYTES)):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def find_checkpoint(directory: str | os.PathLike[str]) -> CheckpointLocation | None:
    """Return the newest complete checkpoint in ``directory``; None if there is none (or no such directory)."""
    root = Path(directory)
    tracker = root / TRACKER
    named = _named_by(tracker) if tracker.is_file() else ""
    if named == RELEASE and _is_complete(root / RELEASE):
        return CheckpointLocation(root, None)
    if named.isdecimal() and _is_complete(root / f"iter_{int(named):07d}"):
        return CheckpointLocation(root, int(named))
    if not tracker.is_file():
        return None
    complete = [
        int(match.group(1))
        for entry in root.iterdir()
        if (match := re.fullmatch(r"iter_(\d{7,})", entry.name)) and _is_complete(entry)
    ]
    return CheckpointLocation(root, max(complete)) if complete else None


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
    """Make the tracker name ``location``, as Megatron's own loader wants it."""
    tracker = location.directory / TRACKER
    if _named_by(tracker) != _name_of(location):
        partial = tracker.with_suffix(f".partial-{os.getpid()}")  # every rank repairs
        partial.write_text(_name_of(location))
        os.replace(partial, tracker)


def _named_by(tracker: Path) -> str:
    return tracker.read_text(encoding="utf-8", errors="replace").strip()


def _name_of(location: CheckpointLocation) -> str:
    """Return the tracker's content that names ``location``."""
    return RELEASE if location.iteration is None else str(location.iteration)


def _is_complete(folder: Path) -> bool:
    """Whether all of a checkpoint was written: torch_dist writes ``.metadata`` last."""
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()
