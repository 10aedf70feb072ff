"""Damage to checkpoint folders: what disks, networks and people do to files."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_camopd.checkpoint.checksums import SUMS, hash_files, write_checksums


def flip_bit(path: Path, *, at: float = 0.5) -> None:
    """Flip one bit of a file, at a fraction of its length."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 16
    path.write_bytes(data)


def zero_block(path: Path) -> None:
    """Overwrite a block in the middle with zeros, as a file system does that lost a write."""
    data = bytearray(path.read_bytes())
    start, size = len(data) // 4, max(1, min(4096, len(data) // 2))
    assert any(data[start : start + size])
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {"bit": flip_bit, "zeros": zero_block, "cut": cut, "missing": remove}


def poison(folder: Path, key: str, value: float) -> None:
    """Set one value of tensor ``key`` in a checkpoint folder, with checksums that are right for it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == key)
    path = folder / place.relative_path
    data = path.read_bytes()
    tensor = torch.load(io.BytesIO(data[place.offset : place.offset + place.length]), weights_only=True)
    tensor.view(-1)[3] = value
    stream = io.BytesIO()
    torch.save(tensor, stream)
    assert len(stream.getvalue()) == place.length
    path.write_bytes(data[: place.offset] + stream.getvalue() + data[place.offset + place.length :])
    write_checksums(folder, hash_files(path for path in folder.iterdir() if path.name != SUMS))
