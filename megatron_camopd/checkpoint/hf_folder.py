"""Hugging Face folders: validated and read tensor by tensor, written shard by shard.

The safetensors format (8 bytes header length, JSON header, raw little-endian data) is read and written here directly
and not through the safetensors library: that way a file's size is checked against its header before a long
conversion starts, single row blocks of a large matrix are read, and a shard is written without holding it in memory.

Memory: one tensor (or row block) at a time, both ways. Tensors are CPU tensors, bf16 or fp32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_camopd.checkpoint import assets
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.table import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, dtype, shape, position of its first byte, and length in bytes."""

    path: Path
    dtype: torch.dtype
    shape: Shape
    offset: int
    nbytes: int


class HFFolder:
    """A validated Hugging Face folder, read lazily.

    ``config`` is the parsed config.json and ``tensors`` maps every name to its place. Opening reads headers only.
    Errors: ConfigurationError naming ``flag`` or the file: folder or shard missing, shard cut short or damaged, index
    and shards that disagree, a dtype other than bf16 and fp32.
    """

    def __init__(self, path: str | os.PathLike[str], *, flag: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir() or not any(self.path.iterdir()):
            found = "is empty" if self.path.is_dir() else "is no folder"
            raise ConfigurationError(f"{flag} {self.path}: {found}; expected a Hugging Face model folder")
        self.config: dict[str, Any] = assets.read_config(self.path)
        self.tensors: dict[str, StoredTensor] = {}
        index = self._read_index()
        for shard in [SINGLE] if index is None else sorted(set(index.values())):
            self.tensors |= read_header(self.path / shard)
        for name, shard in (index or {}).items():
            if name not in self.tensors or self.tensors[name].path.name != shard:
                raise ConfigurationError(f"{self.path / shard}: lacks tensor {name}; {INDEX} says that it is there")

    def _read_index(self) -> dict[str, str] | None:
        """Tensor name -> shard file, or None for a folder with one unsharded file."""
        path = self.path / INDEX
        if not path.exists():
            return None
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            plain = all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{path}: is damaged ({error}); expected JSON with a weight_map") from error
        if not plain:
            raise ConfigurationError(f"{path}: weight_map leaves the folder; expected plain file names")
        return weight_map

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
        """Rows ``start`` to ``stop`` (default: all) of tensor ``name``, in its stored dtype."""
        stored = self.tensors[name]
        row_bytes = stored.nbytes // stored.shape[0]
        stop = stored.shape[0] if stop is None else min(stop, stored.shape[0])
        shape = (max(stop - start, 0), *stored.shape[1:])
        data = bytearray(shape[0] * row_bytes)
        try:
            with stored.path.open("rb") as file:
                file.seek(stored.offset + start * row_bytes)
                found = file.readinto(data)
        except OSError as error:
            raise ConfigurationError(
                f"{stored.path}: cannot be read ({error.strerror}); expected a readable shard"
            ) from error
        if found != len(data):
            raise ConfigurationError(f"{stored.path}: ends within tensor {name}; expected a complete shard")
        if not data:  # which frombuffer refuses
            return torch.empty(shape, dtype=stored.dtype)
        return torch.frombuffer(data, dtype=stored.dtype).view(shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name, after checking the header against the file's size.

    Errors: ConfigurationError naming the file: missing, cut short, damaged header, unsupported dtype.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ConfigurationError(
                    f"{path}: {size} bytes with a header of {length}; expected a complete safetensors file"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; expected a safetensors shard") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{path}: header cannot be read ({error}); expected a safetensors file") from error
    tensors = {}
    expected_size = data_start = 8 + length
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        tensors[name] = _stored_tensor(path, name, fields, data_start)
        expected_size = max(expected_size, tensors[name].offset + tensors[name].nbytes)
    if size != expected_size:
        raise ConfigurationError(f"{path}: has {size} bytes; its header implies {expected_size}")
    return tensors


def _stored_tensor(path: Path, name: str, fields: Any, data_start: int) -> StoredTensor:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sane = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane:
        raise ConfigurationError(f"{path}: header of tensor {name} is damaged; expected dtype, shape, data_offsets")
    if dtype_name not in _DTYPES:
        raise ConfigurationError(f"{path}: tensor {name} has dtype {dtype_name}; expected {' or '.join(_DTYPES)}")
    nbytes = math.prod(shape) * _DTYPES[dtype_name].itemsize
    if end - begin != nbytes:
        raise ConfigurationError(f"{path}: tensor {name} has {end - begin} bytes; its shape {shape} implies {nbytes}")
    return StoredTensor(path, _DTYPES[dtype_name], shape, data_start + begin, nbytes)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Iterable[NewTensor], *, max_shard_bytes: int) -> dict[str, list[NewTensor]]:
    """Spread ``tensors`` in order over files of at most ``max_shard_bytes`` (a larger tensor gets its own): name ->
    tensors. One file is called model.safetensors, several model-00001-of-0000N.safetensors."""
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
