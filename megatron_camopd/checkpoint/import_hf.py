"""Hugging Face folder -> Megatron checkpoint in torch_dist format, streamed.

The checkpoint is what Megatron itself would save and loads at any tensor, pipeline and data-parallel size: global
tensors under Megatron's canonical names, with layers and experts on leading axes, the architecture in ``args`` (so that
``--use-checkpoint-args`` finds it), ``release`` in the tracker file, and the model's small files in ``hf/``.

A DCP save planner of our own names one chunk per tensor, layer and expert, and fetches its data only when the writer
asks for it. No model is built, no process group is needed, and memory stays at the largest tensor of one layer (of one
expert, where a layer has experts) or a block of the vocabulary.
"""

from __future__ import annotations

import io
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm

from megatron_camopd.checkpoint import assets, torch_dist
from megatron_camopd.checkpoint.checksums import hash_files, write_checksums
from megatron_camopd.checkpoint.directory import RELEASE, TRACKER
from megatron_camopd.checkpoint.finite import cast_finite, check_finite
from megatron_camopd.checkpoint.hf_folder import HFFolder
from megatron_camopd.checkpoint.staging import staged_folder
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.family import Family
from megatron_camopd.families.placement import Index, Shape
from megatron_camopd.families.row_orders import pad_rows
from megatron_camopd.families.table import Partition, TensorEntry, TensorTable

# A tensor-parallel rank reads whole chunks: in 16 blocks, ranks of up to TP16 read only their own vocabulary rows.
_VOCAB_BLOCKS = 16


def import_hf(
    hf_path: str | os.PathLike[str], save: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> Path:
    """Convert the model in ``hf_path`` into the new Megatron checkpoint directory ``save``; return that path.

    ``dtype`` is the dtype to store; None keeps the files' own. A model with tied embeddings may carry an equal
    output matrix (``lm_head.weight``), as some published ones do; it is dropped. A tokenizer is checked as at the start
    of a run; a model without any is converted as well.

    Raises:
        ConfigurationError: something is wrong with the input or the target, which then stays untouched. Weights must
            be finite, in the files and in ``dtype``.
    """
    folder = HFFolder(hf_path, flag="--hf-path")
    family, arch = assets.read_model(folder.path)
    table = family.table
    _check_tokenizer(folder.path)
    folder.check(table.hf_shapes(arch), model=family.title, redundant=[table.output_name] if arch.tied else [])
    chunks = list(_chunks(folder, table, arch, dtype))
    if arch.tied and table.output_name in folder.tensors:
        _check_tied(folder, table)
    target = Path(save)
    with staged_folder(target, flag="--save") as staged:
        assets.copy_assets(folder.path, assets.assets_dir(staged))
        with tqdm(
            total=sum(c.nbytes for c in chunks), disable=None, unit="B", unit_scale=True, desc="hf -> megatron"
        ) as bar:
            _write(staged / RELEASE, chunks, _objects(family, arch), progress=bar.update)
        metadata = staged / RELEASE / "metadata.json"
        metadata.write_text(json.dumps(torch_dist.BACKEND), encoding="utf-8")
        write_checksums(staged / RELEASE, hash_files((staged / RELEASE).iterdir()))
        (staged / TRACKER).write_text(RELEASE, encoding="utf-8")
    return target


def _check_tokenizer(folder: Path) -> None:
    """Check the tokenizer as the start of a run does, if there is any file of one."""
    if not assets.has_tokenizer(folder):
        return
    from megatron_camopd.checkpoint.tokenizer import load_folder_tokenizer  # imports transformers, which takes seconds

    load_folder_tokenizer(folder)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A box of one global tensor and how to get its data, shape ``sizes`` and dtype ``dtype``."""

    key: str
    global_shape: Shape
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype
    fetch: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.sizes).numel() * self.dtype.itemsize)


def _chunks(folder: HFFolder, table: TensorTable, arch: Architecture, dtype: torch.dtype | None) -> Iterator[_Chunk]:
    """All chunks of the checkpoint: blocks of rows of the vocabulary matrices, one per index of everything else."""
    stored: dict[str, tuple[str, torch.dtype]] = {}
    for entry, index in table.model_tensors(arch):
        key, offsets, _ = entry.place(index, arch)
        for name in entry.hf_names(index):
            first, key_dtype = stored.setdefault(key, (name, dtype or folder.tensors[name].dtype))
            if dtype is None and folder.tensors[name].dtype != key_dtype:
                raise ConfigurationError(
                    f"{folder.tensors[name].path}: tensor {name} has {folder.tensors[name].dtype} but {first} has "
                    f"{key_dtype}, and Megatron stacks them; expected one dtype, or --dtype"
                )
        shape = entry.shape(arch)
        if entry.partition is Partition.VOCAB:
            rows = shape[0] // _VOCAB_BLOCKS
            for start in range(0, shape[0], rows):
                yield _Chunk(
                    key=key, global_shape=shape, offsets=(start, 0), sizes=(rows, shape[1]), dtype=key_dtype,
                    fetch=_vocab_fetcher(folder, entry.hf[0], start, rows, key_dtype),
                )  # fmt: skip
        else:
            sizes = (1,) * len(offsets) + shape
            yield _Chunk(
                key=key, global_shape=entry.checkpoint_shape(arch), offsets=offsets + (0,) * len(shape),
                sizes=sizes, dtype=key_dtype, fetch=_fetcher(folder, entry, index, arch, sizes, key_dtype),
            )  # fmt: skip


def _vocab_fetcher(
    folder: HFFolder, name: str, start: int, rows: int, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def fetch() -> torch.Tensor:
        return pad_rows(_read(folder, name, dtype, start=start, stop=start + rows), rows)

    return fetch


def _fetcher(
    folder: HFFolder, entry: TensorEntry, index: Index, arch: Architecture, sizes: Shape, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def fetch() -> torch.Tensor:
        parts = [_read(folder, name, dtype) for name in entry.hf_names(index)]
        return entry.to_megatron(parts, arch).reshape(sizes)

    return fetch


def _read(folder: HFFolder, name: str, dtype: torch.dtype, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of tensor ``name`` in ``dtype``, all of them finite."""
    rows = folder.read(name, start=start, stop=stop)
    where = f"{folder.tensors[name].path}: tensor {name}"
    check_finite(rows, where=where, first_row=start)
    return cast_finite(rows, dtype, where=where, reason="--dtype", first_row=start)


def _check_tied(folder: HFFolder, table: TensorTable) -> None:
    """Refuse a tied model whose output matrix is not, bit for bit, its embedding."""
    names = (table.output_name, table.embedding_name)
    output, embedding = (folder.tensors[name] for name in names)
    same = (output.dtype, output.shape) == (embedding.dtype, embedding.shape)
    rows = max(1, (1 << 26) // (embedding.nbytes // embedding.shape[0]))  # blocks of about 64 MiB
    for start in range(0, embedding.shape[0], rows):
        if not same:
            break
        blocks = [folder.read(name, start=start, stop=start + rows) for name in names]
        same = torch.equal(blocks[0].view(torch.uint8), blocks[1].view(torch.uint8))
    if not same:
        raise ConfigurationError(
            f"{output.path}: tensor {names[0]} differs from {names[1]}, but config.json ties them; "
            "expected equal tensors or tie_word_embeddings false"
        )


def _objects(family: Family, arch: Architecture) -> dict[str, io.BytesIO]:
    """The non-tensor entries, by Megatron's ``<key>/shard_<offset>_<shape>`` names."""
    common = {
        "args": Namespace(
            **family.megatron_arguments(arch),
            ckpt_format="torch_dist",
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
        ),
        "checkpoint_version": 3.0,
        "iteration": 0,
        # Tells Megatron that layers lie on an axis of each tensor, not under a key each.
        "content_metadata": {"singleton_local_shards": False},
    }
    # Megatron asks for the "_extra_state" of the modules that it has in memory, which differ between Transformer Engine
    # and local layers: write all. They are the same bytes, and a large model of experts has tens of thousands.
    empty = _pickled(None)
    names = ["decoder.final_layernorm._extra_state/shard_0_1", *family.extra_states(arch)]
    return {"common_state/shard_0_1": _pickled(common)} | dict.fromkeys(names, empty)


def _pickled(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream


class _StreamingPlanner(DefaultSavePlanner):
    """A DCP save planner whose tensors do not exist yet: each chunk is fetched when the writer asks for it."""

    def __init__(self, chunks: list[_Chunk], objects: dict[str, io.BytesIO], progress: Callable[[int], object]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {MetadataIndex(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects = objects
        self._progress = progress

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        for index, chunk in self._chunks.items():
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)),
                properties=TensorProperties(dtype=chunk.dtype),
                size=torch.Size(chunk.global_shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return self._objects[write_item.index.fqn]
        chunk = self._chunks[write_item.index]
        data = chunk.fetch()
        assert tuple(data.shape) == chunk.sizes and data.dtype == chunk.dtype, chunk.key
        self._progress(chunk.nbytes)
        return data


def _write(
    folder: Path, chunks: list[_Chunk], objects: dict[str, io.BytesIO], *, progress: Callable[[int], object]
) -> None:
    """Run DCP's save protocol with one writer. ``dcp.save`` does the same, but wraps errors from the planner."""
    # per_thread_copy_ahead=0: never look for a CUDA stream, the data is on the CPU.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    planner = _StreamingPlanner(chunks, objects, progress)
    planner.set_up_planner({}, is_coordinator=True)
    writer.set_up_storage_writer(True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    final = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    try:
        writer.finish(metadata, [writer.write_data(final, planner).wait()])
    except RuntimeError as error:  # after a failed write, as on a full disk, torch complains of a wrong position
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
