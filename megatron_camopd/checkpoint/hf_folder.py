"""Hugging Face folders: validated and read tensor by tensor, written shard by shard.

The safetensors library checks a file's header against its size. The data is read here, by its place in the file: the
library maps files, and a mapped file that another program cuts short kills the process that reads it (SIGBUS). Rows of
a large matrix are read alone. The library has no writer that streams, so shards are written here (8 bytes header
length, JSON header, raw little-endian data), one row block at a time.

Tensors are CPU tensors, bf16 or fp32.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_camopd.checkpoint import assets
from megatron_camopd.checkpoint.json_files import read_json_object
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.placement import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
_READ_BYTES = 1 << 26  # of one call, so that a signal does not have to wait
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: Path of the file.
        dtype: Dtype of the values.
        shape: Shape of the tensor.
        offset: First byte of the tensor in the file.
        version: What changes when somebody writes to the file: device, inode, size, time of the last change.
    """

    path: Path
    dtype: torch.dtype
    shape: Shape
    offset: int
    version: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(math.prod(self.shape) * self.dtype.itemsize)


class HFFolder:
    """A validated Hugging Face folder, read lazily.

    ``config`` is the parsed config.json, ``tensors`` maps every name to its place.

    Args:
        path: the folder.
        flag: the flag that named it, for messages.

    Raises:
        ConfigurationError: a folder or shard is missing, cut short or damaged, index and shards disagree, or a tensor
            has a dtype other than bf16 and fp32. The line names ``flag`` or the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, flag: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir() or not any(self.path.iterdir()):
            found = "is empty" if self.path.is_dir() else "is no folder"
            raise ConfigurationError(f"{flag} {self.path}: {found}; expected a Hugging Face model folder")
        assets.check_files(self.path)
        self.config: dict[str, Any] = assets.read_config(self.path)
        index = self._read_index()
        shards = [SINGLE] if index is None else sorted(set(index.values()))
        headers = {shard: read_header(self.path / shard) for shard in shards}
        self.tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
        for name, shard in (index or {}).items():  # where two shards hold a tensor, the index says whose counts
            if name not in headers[shard]:
                raise ConfigurationError(f"{self.path / shard}: lacks tensor {name}; {INDEX} says that it is there")
            self.tensors[name] = headers[shard][name]

    def _read_index(self) -> dict[str, str] | None:
        """Return tensor name -> shard file, or None for a folder with one unsharded file."""
        path = self.path / INDEX
        if not path.exists():
            return None
        weight_map = read_json_object(path, "JSON with a weight_map").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigurationError(f"{path}: is damaged (no weight_map); expected JSON with a weight_map")
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()):
            raise ConfigurationError(f"{path}: weight_map leaves the folder; expected plain file names")
        if (self.path / SINGLE).exists() and SINGLE not in weight_map.values():
            raise ConfigurationError(
                f"{self.path}: holds {SINGLE} and {INDEX}, which does not name it; remove the one that is left over"
            )
        return dict(weight_map)

    def check(self, expected: Mapping[str, Shape], *, model: str, redundant: Iterable[str] = ()) -> None:
        """Compare names and shapes with ``expected``, those of a ``model`` (its name, for messages).

        Names in ``redundant`` may be present as well.

        Raises:
            ConfigurationError: Names the first tensor that is missing, unexpected or of another shape.
        """
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise ConfigurationError(f"{self.path}: lacks tensor {missing[0]}{_more(missing)}; config.json implies it")
        unexpected = sorted(self.tensors.keys() - expected.keys() - set(redundant))
        if unexpected:
            raise ConfigurationError(
                f"{self.tensors[unexpected[0]].path}: has unexpected tensor {unexpected[0]}{_more(unexpected)}; "
                f"expected only those of the {model} in config.json"
            )
        for name, shape in expected.items():
            found = self.tensors[name]
            if found.shape != shape:
                raise ConfigurationError(
                    f"{found.path}: tensor {name} has shape {found.shape}; config.json implies {shape}"
                )

    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` (default: all) of tensor ``name``, in its stored dtype.

        Raises:
            ConfigurationError: the shard cannot be read any more.
        """
        stored = self.tensors[name]
        height = stored.shape[0] if stored.shape else 1
        first, last, _ = slice(start, stop).indices(height)
        width = stored.nbytes // height if height else 0
        rows = torch.empty((max(0, last - first), *stored.shape[1:]) if stored.shape else (), dtype=stored.dtype)
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset + first * width)
                count = _read_into(file, rows)
                changed = _version(file) != stored.version
        except OSError as error:
            raise _unreadable(stored.path, error) from error
        if changed or count != rows.nbytes:
            raise ConfigurationError(f"{stored.path}: changed while it was read; leave the folder as it is")
        return rows


def _read_into(file: io.FileIO | io.BufferedReader, rows: torch.Tensor) -> int:
    """Fill ``rows`` from the position of ``file`` on; return the number of bytes that there were."""
    target = memoryview(rows.reshape(-1).view(torch.uint8).numpy())
    count = 0
    while count < len(target) and (found := os.readv(file.fileno(), [target[count : count + _READ_BYTES]])):
        count += found
    return count


def _version(file: io.FileIO | io.BufferedReader) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name, after its header was checked against the file's size.

    Raises:
        ConfigurationError: naming the file: missing, cut short, a damaged header, an unsupported dtype.
    """
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path}: is no regular file; expected a safetensors shard")
    tensors = {}
    try:
        with path.open("rb") as data, safe_open(path, framework="pt") as file:
            version, places = _version(data), _places(data)
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                part = file.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in _DTYPES:
                    raise ConfigurationError(
                        f"{path}: tensor {name} has dtype {dtype}; expected {' or '.join(_DTYPES)}"
                    )
                tensors[name] = StoredTensor(path, _DTYPES[dtype], shape, places[name], version)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; expected a safetensors shard") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise _unreadable(path, error) from error
    return tensors


def _places(file: io.FileIO | io.BufferedReader) -> dict[str, int]:
    """Return the first byte of every tensor in a safetensors ``file`` whose header the library found sound."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _unreadable(path: Path, error: Exception) -> ConfigurationError:
    text = str(getattr(error, "strerror", None) or error)
    reason = " ".join(text.removeprefix("Error while deserializing header: ").split())
    return ConfigurationError(f"{path}: cannot be read ({reason}); expected a complete safetensors file")


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(math.prod(self.shape) * self.dtype.itemsize)


def plan_shards(tensors: Iterable[NewTensor], *, max_shard_bytes: int) -> dict[str, list[NewTensor]]:
    """Spread ``tensors`` in order over files of at most ``max_shard_bytes``; a larger tensor gets one of its own.

    Returns the tensors of each file by its name: model.safetensors, or model-00001-of-0000N.safetensors of several.
    """
    shards: list[list[NewTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_shard(
    path: Path, tensors: Iterable[NewTensor], *, row_blocks: Callable[[NewTensor], Iterator[torch.Tensor]]
) -> None:
    """Write one safetensors file; ``row_blocks`` yields the rows of a tensor in order, in blocks of any height."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    tensors = list(tensors)
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as readers that map the file like it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            written = 0
            for block in row_blocks(tensor):
                assert block.dtype == tensor.dtype and block.shape[1:] == tensor.shape[1:], tensor.name
                written += file.write(block.contiguous().view(torch.uint8).numpy().data)
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes written, {tensor.nbytes} planned"
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, shards: Mapping[str, Iterable[NewTensor]]) -> None:
    """Write model.safetensors.index.json for several ``shards``; a single model.safetensors needs none."""
    if list(shards) == [SINGLE]:
        return
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
