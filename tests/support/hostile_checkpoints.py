"""Checkpoints that would run code if they were unpickled without care; what they run is to touch a file."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_camopd.checkpoint.checksums import SUMS


class Touch:
    """An object whose pickle touches a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def spoil_index(folder: Path, marker: Path) -> None:
    """Let the index ``.metadata`` of the checkpoint ``folder`` touch ``marker``."""
    (folder / SUMS).unlink(missing_ok=True)  # whoever writes code into a checkpoint does not leave its checksums
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(marker)))


def spoil_entry(folder: Path, marker: Path, key: str = "common_state/shard_0_1") -> None:
    """Let a non-tensor entry of the checkpoint ``folder`` touch ``marker``; its index stays sound."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (place,) = [place for index, place in metadata.storage_data.items() if index.fqn == key]
    stream = io.BytesIO()
    torch.save([Touch(marker)], stream)
    path = folder / place.relative_path
    place.offset, place.length = path.stat().st_size, len(stream.getvalue())
    with path.open("ab") as file:
        file.write(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / SUMS).unlink(missing_ok=True)


SPOILED = {"index": spoil_index, "entry": spoil_entry}
