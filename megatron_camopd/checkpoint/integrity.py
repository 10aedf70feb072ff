"""Integrity of checkpoints: found damaged before processes meet, without running what a file says."""

import io
import pickle
from typing import Any

import torch

from megatron_camopd.checkpoint.directory import CheckpointLocation
from megatron_camopd.checkpoint.unpickling import RestrictedUnpickler, restricted_unpickling
from megatron_camopd.errors import ConfigurationError

_COMMON = "common_state/"


def check_readable(location: CheckpointLocation, flag: str) -> None:
    """Read the index and the common state (arguments, versions) of a checkpoint, as Megatron will when it loads it.

    Raises:
        ConfigurationError: they cannot be read; the line names ``flag`` and the folder.
    """
    folder = location.folder
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = RestrictedUnpickler(file).load()
        for index, place in metadata.storage_data.items():
            if index.fqn.startswith(_COMMON):
                _read_entry(folder / place.relative_path, place)
    # Damaged files can raise anything.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"{flag} {location.directory}: its checkpoint cannot be read ({reason.strip()}); it is damaged"
        ) from error


def _read_entry(path: Any, place: Any) -> None:
    with path.open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    if len(data) != place.length:
        raise pickle.UnpicklingError(f"{path.name} ends after {len(data)} of {place.length} bytes")
    with restricted_unpickling():
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
