"""Megatron's torch_dist checkpoints on disk: where things lie, and a reader that trusts nothing it unpickles.

    <directory>/latest_checkpointed_iteration.txt      "release", or the number of the newest iteration
    <directory>/hf/                                    config.json, tokenizer ...            (see assets)
    <directory>/release/  or  iter_0000010/            metadata.json, .metadata, *.distcp

The payload is PyTorch Distributed Checkpoint (DCP): global tensors cut into boxes ("chunks") by whatever parallel
layout saved them. ``.metadata`` is a pickle by design; it is read here with an unpickler that builds only DCP's
own record types, and chunks are read with ``weights_only``: exporting a foreign checkpoint runs none of its code.
"""

from __future__ import annotations

import io
import math
import pickle
import types
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_camopd.checkpoint.directory import CheckpointLocation, find_checkpoint, require_checkpoint
from megatron_camopd.checkpoint.unpickling import is_record
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.placement import Shape

_COMMON = "common_state/"
_COMMON_FILE = "common.pt"
"""Where earlier versions of Megatron put what is not sharded."""
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Content of ``metadata.json``, by which Megatron tells the format."""


def checkpoint_folder(directory: Path, *, iteration: int | None, flag: str) -> Path:
    """The folder of ``iteration`` in a checkpoint directory; None: of the newest complete checkpoint.

    That is the one that the tracker names, unless the tracker or that folder was cut short.

    Raises:
        ConfigurationError: no such directory, no complete checkpoint, no such iteration; the line names ``flag``.
    """
    if iteration is None:
        return (find_checkpoint(directory) or require_checkpoint(flag, directory)).folder
    wanted = CheckpointLocation(directory, iteration)
    if not wanted.complete:
        have = ", ".join(sorted(path.parent.name for path in directory.glob("*/.metadata"))) or "none"
        raise ConfigurationError(f"{flag} {directory}: has no complete checkpoint {wanted.folder.name}; found: {have}")
    return wanted.folder


class TorchDistReader:
    """Reads boxes of the global tensors of one checkpoint folder, on CPU, in their stored dtype.

    Memory: the box and one chunk. The last chunk is kept, so neighbouring row blocks of a large matrix cost one read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _load_metadata(folder / ".metadata")
        self._chunk: tuple[MetadataIndex, torch.Tensor] | None = None
        self._rows: dict[str, dict[tuple[int, int], list[ChunkStorageMetadata]]] = {}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Global shape of every tensor, by key."""
        return {key: tuple(tensor.size) for key, tensor in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of tensor ``key``."""
        return self._tensors[key].properties.dtype

    def check(self, key: str, offsets: Shape, sizes: Shape) -> None:
        """Check that the chunks of tensor ``key`` cover the box at ``offsets`` of shape ``sizes``; reads no data.

        Raises:
            ConfigurationError: The chunks leave a gap; the line names the tensor and the box.
        """
        common = (_overlap(offsets, sizes, chunk) for chunk in self._chunks(key, offsets, sizes))
        filled = sum(math.prod(end - start for start, end in spans) for spans in common)
        if filled != math.prod(sizes):
            raise ConfigurationError(
                f"{self.folder}: chunks of tensor {key} hold {filled} of {math.prod(sizes)} values at {offsets}; "
                "expected a complete checkpoint"
            )

    def read(self, key: str, offsets: Shape, sizes: Shape) -> torch.Tensor:
        """The box of tensor ``key`` that starts at ``offsets`` and has shape ``sizes``.

        Raises:
            ConfigurationError: a chunk is absent or damaged, or the chunks leave a gap; the line names the file.
        """
        self.check(key, offsets, sizes)
        box = torch.empty(sizes, dtype=self.dtype(key))
        for chunk in self._chunks(key, offsets, sizes):
            source = self._read_chunk(MetadataIndex(key, chunk.offsets), tuple(chunk.sizes))
            common = _overlap(offsets, sizes, chunk)
            into = tuple(slice(s - o, e - o) for (s, e), o in zip(common, offsets, strict=True))
            outof = tuple(slice(s - c, e - c) for (s, e), c in zip(common, chunk.offsets, strict=True))
            box[into] = source[outof]
        return box

    @cached_property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        entries = self._metadata.state_dict_metadata.items()
        return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def _chunks(self, key: str, offsets: Shape, sizes: Shape) -> Iterator[ChunkStorageMetadata]:
        """Iterate over the chunks of ``key`` that share values with the box at ``offsets`` of shape ``sizes``.

        Chunks are grouped by their place on the first axis: that of a model of experts has one for each expert of each
        layer, too many to look at all of them for every one.
        """
        if key not in self._rows:
            rows = self._rows[key] = {}
            for chunk in self._tensors[key].chunks:
                span = (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if chunk.sizes else (0, 1)
                rows.setdefault(span, []).append(chunk)
        first, last = (offsets[0], offsets[0] + sizes[0]) if sizes else (0, 1)
        for (start, end), chunks in self._rows[key].items():
            if start < last and first < end:
                yield from (chunk for chunk in chunks if all(a < b for a, b in _overlap(offsets, sizes, chunk)))

    def _read_chunk(self, index: MetadataIndex, shape: Shape) -> torch.Tensor:
        if self._chunk is not None and self._chunk[0] == index:
            return self._chunk[1]
        self._chunk = None
        place = self._metadata.storage_data[index]
        path = self.folder / Path(place.relative_path).name  # DCP writes flat folders: never look outside
        if getattr(place, "transform_descriptors", None):
            raise ConfigurationError(f"{path}: is stored with {place.transform_descriptors}; expected plain chunks")
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
            if len(data) != place.length:
                raise EOFError(f"file ends after {len(data)} of {place.length} bytes")
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigurationError(
                f"{path}: chunk of tensor {index.fqn} cannot be read ({reason}); expected a complete checkpoint"
            ) from error
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            raise ConfigurationError(f"{path}: chunk of tensor {index.fqn} is not a tensor of shape {shape}")
        self._chunk = (index, tensor)
        return tensor


def _overlap(offsets: Shape, sizes: Shape, chunk: ChunkStorageMetadata) -> list[tuple[int, int]]:
    """Return start and end on each axis of what a box and a chunk have in common; the end may lie before the start."""
    box = zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
    return [(max(first, start), min(first + size, start + length)) for first, size, start, length in box]


def saved_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments that a checkpoint folder states, by name; values of unknown types are inert.

    Raises:
        ConfigurationError: they cannot be read; the line names the folder.
    """
    module: Any = types.ModuleType("inert_pickle")
    vars(module).update({name: value for name, value in vars(pickle).items() if not name.startswith("__")})
    module.Unpickler = _MetadataUnpickler
    module.load = lambda file, **options: _MetadataUnpickler(file, **options).load()
    metadata = _load_metadata(folder / ".metadata")
    try:
        places = (place for index, place in metadata.storage_data.items() if index.fqn.startswith(_COMMON))
        if (place := next(places, None)) is not None:
            with (folder / Path(place.relative_path).name).open("rb") as file:
                file.seek(place.offset)
                stream = io.BytesIO(file.read(place.length))
            (common,) = torch.load(stream, map_location="cpu", weights_only=False, pickle_module=module)
        elif (older := folder / _COMMON_FILE).exists():
            common = torch.load(older, map_location="cpu", weights_only=False, pickle_module=module)
        else:
            return {}
        return dict(vars(common["args"])) if "args" in common else {}
    except Exception as error:  # damaged files can raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConfigurationError(f"{folder}: its arguments cannot be read ({reason}); it is damaged") from error


class _Inert:
    """Stands for any other record type: takes whatever the pickle hands it and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler of DCP's ``.metadata`` that builds its record types alone.

    Everything else, such as what Megatron attaches for its own later use, becomes inert.
    """

    def find_class(self, module: str, name: str) -> Any:
        if is_record(module, name):
            return super().find_class(module, name)
        return _Inert


def _load_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, ImportError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error}); expected torch_dist metadata") from error
    if not isinstance(metadata, Metadata):
        raise ConfigurationError(f"{path}: holds no tensor metadata; expected torch_dist metadata")
    return metadata
