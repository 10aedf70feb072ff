"""Integrity of checkpoints: found damaged before a run trains on them, without running what a file says.

Two checks find damage. Each process reads the index and the common state of every checkpoint that it will load, which
finds what is missing or cut short there. Then the processes hash all files, each a share, and compare them with
``SHA256SUMS``, which finds every flipped bit. A damaged checkpoint of the run itself is passed over for the one before
it; a damaged student or teacher ends the run.
"""

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_camopd.checkpoint.checksums import SUMS, damaged_files
from megatron_camopd.checkpoint.directory import CheckpointLocation, find_checkpoint
from megatron_camopd.checkpoint.unpickling import RestrictedUnpickler, restricted_unpickling
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime.rendezvous import exchange, process_count, process_number

_COMMON = "common_state/"


def check_readable(location: CheckpointLocation, flag: str) -> None:
    """Read the index and the common state (arguments, versions) of a checkpoint, as Megatron will when it loads it.

    Raises:
        ConfigurationError: they cannot be read; the line names ``flag`` and the folder.
    """
    reason = unreadable(location)
    if reason is not None:
        raise ConfigurationError(
            f"{flag} {location.directory}: its checkpoint cannot be read ({reason}); it is damaged"
        )


def unreadable(location: CheckpointLocation) -> str | None:
    """Return why the index or the common state of a checkpoint cannot be read, or None if they can."""
    folder = location.folder
    name = f"{folder.name}/.metadata"
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = RestrictedUnpickler(file).load()
        name = f"{folder.name}/metadata.json"
        if "sharded_backend" not in json.loads((folder / "metadata.json").read_text(encoding="utf-8")):
            raise ValueError("it names no sharded_backend")
        name = folder.name
        for index, place in metadata.storage_data.items():
            path = folder / place.relative_path
            if index.fqn.startswith(_COMMON):
                _read_entry(path, place)
            elif path.stat().st_size < place.offset + place.length:
                raise pickle.UnpicklingError(f"{path.name} ends before its entry {index.fqn}")
    except Exception as error:  # damaged files can raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"{name}: {reason.strip()}"
    return None


def _read_entry(path: Path, place: Any) -> None:
    with path.open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    if len(data) != place.length:
        raise pickle.UnpicklingError(f"{path.name} ends after {len(data)} of {place.length} bytes")
    with restricted_unpickling():
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def newest_intact(save: str, damaged: Mapping[int, str]) -> tuple[CheckpointLocation | None, dict[int, str]]:
    """Return the newest checkpoint of the run in ``save`` that can be read, and why newer ones are passed over.

    Args:
        save: The folder of the run.
        damaged: Why iterations that were found damaged before are passed over.

    Returns:
        The checkpoint, or None if there is none, and the iterations passed over with the reasons.

    Raises:
        ConfigurationError: There are checkpoints, all of them damaged.
    """
    passed_over = dict(damaged)
    while (found := find_checkpoint(save, without=passed_over)) is not None and found.iteration is not None:
        reason = unreadable(found)
        if reason is None:
            break
        passed_over[found.iteration] = reason
    reasons = "; ".join(reason for _, reason in sorted(passed_over.items()))
    if found is None and passed_over:
        which = "its checkpoint" if len(passed_over) == 1 else f"none of its {len(passed_over)} checkpoints"
        can = "cannot" if len(passed_over) == 1 else "can"
        raise ConfigurationError(
            f"--save {save}: {which} {can} be read ({reasons}); damaged, and there is none before; restore one, or "
            "name another folder to start a new run"
        )
    return found, passed_over


_said: set[str] = set()


def say_passed_over(save: str, found: CheckpointLocation | None, passed_over: Mapping[int, str]) -> None:
    """Print, once and on rank 0, which damaged checkpoints are passed over for ``found``."""
    reasons = "; ".join(reason for _, reason in sorted(passed_over.items()))
    if found is not None and reasons and reasons not in _said and process_number() == 0:
        _said.add(reasons)
        print(f"WARNING: --save {save}: damaged ({reasons}); going on from {found.folder.name}", flush=True)


def verify(locations: Mapping[str, CheckpointLocation], resumed: CheckpointLocation | None) -> dict[int, str]:
    """Hash all checkpoints that a run loads, each process a share, and return what is damaged of the run's own.

    Collective over the processes of the command, which need not have formed a group yet.

    Args:
        locations: The checkpoints by the text that names their flag and folder in errors.
        resumed: The checkpoint of the run itself, if it goes on from one; it must be among ``locations``.

    Returns:
        The number of the resumed checkpoint and why it is damaged; empty if it is not.

    Raises:
        ConfigurationError: Another checkpoint is damaged, on every process; the text names the file.
    """
    folders = [location.folder for location in locations.values()]
    leads = process_number() == 0
    damage: dict[int, str] = {}
    # By their places, because nodes may mount one file system under different paths.
    own = damaged_files(folders, share=process_number(), shares=process_count(), progress=leads)
    for found in exchange("checksums", list(own.items())):
        damage = dict(found) | damage
    of_run: dict[int, str] = {}
    for name, location in locations.items():
        reason = damage.get(folders.index(location.folder))
        if reason is not None and location == resumed and resumed.iteration is not None:
            of_run[resumed.iteration] = reason
        elif reason is not None:
            raise ConfigurationError(f"{name}: {reason}; restore the file, or give another checkpoint")
        elif leads and not (location.folder / SUMS).exists():
            print(f"{name}: {location.folder.name} has no {SUMS} (another program or version made it), so it is not "
                  "verified", flush=True)  # fmt: skip
    return of_run
