"""Megatron checkpoint in torch_dist format -> Hugging Face folder, streamed.

Works on what the importer wrote and on what training saved at any parallel layout: both hold the same global tensors,
and optimizer, scheduler and random states beside them are left alone. Architecture, tokenizer and dtype come from the
``hf/`` folder of the checkpoint directory. Memory: the largest tensor of one layer, or of one expert where layers have
experts, or one chunk of the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_camopd.checkpoint import assets, torch_dist
from megatron_camopd.checkpoint.checksums import damaged_files
from megatron_camopd.checkpoint.consistency import check_config
from megatron_camopd.checkpoint.finite import cast_finite, check_finite
from megatron_camopd.checkpoint.hf_folder import NewTensor, plan_shards, write_index, write_shard
from megatron_camopd.checkpoint.staging import staged_folder
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.family import Family
from megatron_camopd.families.placement import Index, Shape
from megatron_camopd.families.table import Partition, TensorEntry

DEFAULT_SHARD_BYTES = 4_000_000_000
_BLOCK_BYTES = 1 << 26
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")

Part = tuple[TensorEntry, Index, int]


def export_hf(
    load: str | os.PathLike[str],
    save: str | os.PathLike[str],
    *,
    iteration: int | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Convert the Megatron checkpoint directory ``load`` into the new Hugging Face folder ``save``; return that path.

    ``iteration`` picks ``iter_<iteration>``, None the newest. Tensors are written in the dtype that config.json names
    (if it names none, in the stored one), vocabulary padding is cut, a tied model gets no output matrix.

    Raises:
        ConfigurationError: something is wrong with the input or the target, which then stays untouched. Weights must
            be finite, in the checkpoint and in the dtype that is written.
    """
    directory = Path(load)
    folder = torch_dist.checkpoint_folder(directory, iteration=iteration, flag="--load")
    reader = TorchDistReader(folder)
    assets_dir = assets.assets_dir(directory)
    if assets_dir.is_dir():  # else the next line says what is missing
        assets.check_files(assets_dir)
    family, arch = assets.read_model(assets_dir)
    _check(reader, family, arch)
    check_config(folder)
    parts: dict[str, Part] = {}
    tensors: list[NewTensor] = []
    for entry, index in family.table.model_tensors(arch):
        names = zip(entry.hf_names(index), entry.hf_shapes(arch), strict=True)
        for number, (name, shape) in enumerate(names):
            parts[name] = (entry, index, number)
            tensors.append(NewTensor(name, arch.dtype or reader.dtype(entry.place(index, arch).key), shape))
    shards = plan_shards(tensors, max_shard_bytes=max_shard_bytes)
    target = Path(save)
    with staged_folder(target, flag="--save") as staged:
        total = sum(tensor.nbytes for tensor in tensors)
        with tqdm(total=total, disable=None, unit="B", unit_scale=True, desc="megatron -> hf") as bar:
            row_blocks = _row_blocks(reader, arch, parts, progress=bar.update)
            for file, members in shards.items():
                write_shard(staged / file, members, row_blocks=row_blocks)
        write_index(staged, shards)
        assets.copy_assets(assets_dir, staged)
        _verify(folder)  # last: the files are in memory now, and a chunk that cannot be read is named better above
    return target


def _verify(folder: Path) -> None:
    """Check that the files of the checkpoint have the SHA-256 that it states."""
    for reason in damaged_files([folder], progress=True).values():
        raise ConfigurationError(f"--load: {reason}; restore the file, or pick another checkpoint with --iteration")


def _check(reader: TorchDistReader, family: Family, arch: Architecture) -> None:
    """Compare the model's tensors in the checkpoint with the architecture, before anything is written."""
    found = reader.shapes
    keys: set[str] = set()
    for entry, index in family.table.model_tensors(arch):
        key = entry.place(index, arch).key
        if key not in keys:
            _check_shape(reader, key, entry, arch, found.get(key))
            keys.add(key)
        reader.check(key, *_box(entry, index, arch))
    unexpected = sorted(key for key in found if key.startswith(_MODEL_KEYS) and key not in keys)
    if unexpected:
        raise ConfigurationError(
            f"{reader.folder}: has unexpected tensor {unexpected[0]}; expected the {family.title} of hf/config.json"
        )


def _check_shape(
    reader: TorchDistReader, key: str, entry: TensorEntry, arch: Architecture, found: Shape | None
) -> None:
    """Compare the shape that was ``found`` under ``key`` with that of ``entry``."""
    shape = entry.checkpoint_shape(arch)
    if found is None:
        raise ConfigurationError(f"{reader.folder}: lacks tensor {key}; hf/config.json implies shape {shape}")
    if entry.partition is Partition.VOCAB and found[0] >= arch.vocab_size:
        shape = (found[0], *shape[1:])  # padded for the tensor-parallel size of the run that saved it
    if found != shape:
        raise ConfigurationError(f"{reader.folder}: tensor {key} has shape {found}; hf/config.json implies {shape}")


def _box(entry: TensorEntry, index: Index, arch: Architecture) -> tuple[Shape, Shape]:
    """Return offsets and sizes of the tensor of ``index`` under its key, without the padding of the vocabulary."""
    shape, offsets = entry.shape(arch), entry.place(index, arch).offsets
    if entry.partition is Partition.VOCAB:
        (shape,) = entry.hf_shapes(arch)
    return offsets + (0,) * len(shape), (1,) * len(offsets) + shape


def _row_blocks(
    reader: TorchDistReader, arch: Architecture, parts: dict[str, Part], *, progress: Callable[[int], object]
) -> Callable[[NewTensor], Iterator[torch.Tensor]]:
    """A function that yields the rows of a Hugging Face tensor, reading each Megatron tensor of an index once."""
    last: tuple[tuple[str, Index], tuple[torch.Tensor, ...]] | None = None

    def parts_of(entry: TensorEntry, index: Index) -> tuple[torch.Tensor, ...]:
        nonlocal last
        if last is None or last[0] != (entry.key, index):
            last = None  # let go of the previous one before reading the next
            box = reader.read(entry.place(index, arch).key, *_box(entry, index, arch))
            last = ((entry.key, index), entry.to_hf(box.reshape(entry.shape(arch)), arch))
        return last[1]

    def finite(tensor: NewTensor, entry: TensorEntry, block: torch.Tensor, start: int = 0) -> torch.Tensor:
        key = entry.place(parts[tensor.name][1], arch).key
        where = f"{reader.folder}: tensor {tensor.name} (of {key})"
        check_finite(block, where=where, first_row=start)
        return cast_finite(block, tensor.dtype, where=where, reason="hf/config.json", first_row=start)

    def row_blocks(tensor: NewTensor) -> Iterator[torch.Tensor]:
        entry, index, number = parts[tensor.name]
        if entry.partition is not Partition.VOCAB:
            block = finite(tensor, entry, parts_of(entry, index)[number])
            progress(block.nbytes)
            yield block
            return
        rows, width = tensor.shape
        step = max(1, _BLOCK_BYTES // (width * tensor.dtype.itemsize))
        for start in range(0, rows, step):
            block = finite(tensor, entry, reader.read(entry.key, (start, 0), (min(step, rows - start), width)), start)
            progress(block.nbytes)
            yield block

    return row_blocks
