"""Tables that convert the tensors of a Hugging Face model to those of a Megatron model, and back.

Each :class:`TensorEntry` relates the Hugging Face names of one Megatron tensor to its canonical sharded name (the key
in a torch_dist checkpoint), to the two names that it can have in memory, and to the way tensor parallelism cuts it. The
entries of a family form a :class:`TensorTable`. Import, export and the weight sync to the rollout engine all use it.

An entry stands for the same tensor of every layer (and expert), or of those layers that have it; an index selects one
of them: ``(layer,)``, ``(layer, expert)``, or ``()`` for a tensor that the model has once. A checkpoint stacks the
tensors of an entry; see :mod:`~megatron_camopd.families.placement`.

Shapes of Megatron's tensors for one index, with H hidden size, F feed-forward size, n query heads, g query groups,
r = n / g, d head dimension, V vocabulary size, V' padded vocabulary size:

    QKV        [g (r + 2) d, H]   for each query group: r query heads, a key head, a value head; a bias has no axis H
    GATE_UP    [2 F, H]           gate rows, then up rows (a tensor-parallel rank holds [gate_r; up_r])
    ROW        [H, n d], [H, F]
    VOCAB      [V', H]            rows >= V are zeros in a checkpoint and left out for Hugging Face

Conversions only move rows, so they are exact in every dtype and each undoes the other bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from math import prod

import torch

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families import placement
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.placement import Index, Layers, Place, Shape, every_layer
from megatron_camopd.families.row_orders import fuse_qkv, pad_rows, split_qkv

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"


class Partition(Enum):
    """Way in which tensor parallelism cuts the Megatron tensor of one index."""

    REPLICATED = "every rank holds all of it"
    VOCAB = "rows, one block of padded vocabulary per rank"
    QKV = "rows, interleaved by query group, so equal blocks of rows hold whole groups"
    GATE_UP = "rows of the gate and rows of the up projection separately: a rank holds [gate_r; up_r]"
    ROW = "columns (the input dimension)"

    @property
    def dim(self) -> int | None:
        """Axis along which the tensor is cut, None if it is replicated."""
        return {Partition.REPLICATED: None, Partition.ROW: 1}.get(self, 0)


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One kind of Megatron tensor and the Hugging Face tensors that it is made of.

    In the names ``{layer}`` and ``{expert}`` stand for the numbers of the index.

    Attributes:
        key: Megatron's canonical sharded name.
        hf: Hugging Face names of the parts.
        te: Name in memory with Transformer Engine layers; numbers count within the pipeline stage and the
            expert-parallel rank.
        local: Name in memory with local layers, with the same numbers.
        partition: How tensor parallelism cuts the tensor.
        hf_shapes: Returns the Hugging Face shapes of one index, in the order of ``hf``.
        layers: Returns the layers that have this tensor.
    """

    key: str
    hf: tuple[str, ...]
    te: str
    local: str
    partition: Partition
    hf_shapes: Callable[[Architecture], tuple[Shape, ...]]
    layers: Layers = every_layer

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes of an index: those of ``layer`` and ``expert`` that occur in the entry's names."""
        return tuple(axis for axis in placement.AXES if f"{{{axis}}}" in self.te)

    @property
    def per_layer(self) -> bool:
        """Whether layers have such a tensor."""
        return "layer" in self.axes

    def present(self, arch: Architecture) -> bool:
        """Return whether a model of ``arch`` has this tensor.

        A tied model has no output matrix of its own, and a model need not have every kind of layer.
        """
        if self.per_layer:
            return len(self.layers(arch)) > 0
        return not (arch.tied and self.key == OUTPUT_KEY)

    def layer_indices(self, layer: int, arch: Architecture) -> Iterator[Index]:
        """Iterate over the indices of this tensor in one ``layer``; there are none if the layer lacks it."""
        return placement.layer_indices(layer, self.axes, self.layers, arch)

    def place(self, index: Index, arch: Architecture) -> Place:
        """Return where a checkpoint keeps the tensor of ``index``."""
        return placement.place(self.key, index, self.axes, arch)

    def shape(self, arch: Architecture) -> Shape:
        """Return the shape of the Megatron tensor of one index, over all tensor-parallel ranks."""
        shapes = self.hf_shapes(arch)
        if self.partition is Partition.VOCAB:
            return (arch.padded_vocab_size, *shapes[0][1:])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def checkpoint_shape(self, arch: Architecture) -> Shape:
        """Return the global shape under a key of :meth:`place` in a checkpoint: stacked axes, then :meth:`shape`."""
        return (*placement.stacked(self.axes, arch), *self.shape(arch))

    def hf_names(self, index: Index) -> tuple[str, ...]:
        """Return the Hugging Face names of the parts of the tensor at ``index``."""
        numbers = dict(zip(self.axes, index, strict=True))
        return tuple(name.format(**numbers) for name in self.hf)

    def find_index(self, name: str) -> Index | None:
        """Return the index of ``name``, either name in memory; None if it is not a name of this entry."""
        match = next((match for pattern in self._patterns if (match := pattern.fullmatch(name))), None)
        return None if match is None else tuple(int(match[axis]) for axis in self.axes)

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        escaped = (re.escape(name) for name in (self.te, self.local))
        return tuple(re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", name)) for name in escaped)

    def to_megatron(self, parts: Sequence[torch.Tensor], arch: Architecture) -> torch.Tensor:
        """Join the Hugging Face ``parts`` of one index, in the order of ``hf``, into the Megatron tensor."""
        if self.partition is Partition.QKV:
            return fuse_qkv(parts[0], parts[1], parts[2], arch)
        if self.partition is Partition.VOCAB:
            return pad_rows(parts[0], arch.padded_vocab_size)
        return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]

    def to_hf(self, tensor: torch.Tensor, arch: Architecture) -> tuple[torch.Tensor, ...]:
        """Split a Megatron tensor of one index into its Hugging Face parts, the inverse of :meth:`to_megatron`.

        The vocabulary may have any padding. A tensor-parallel shard of QKV that holds whole query groups is split into
        the rank's rows of q, k and v.
        """
        if self.partition is Partition.QKV:
            return split_qkv(tensor, arch)
        if self.partition is Partition.VOCAB:
            return (tensor[: arch.vocab_size],)
        result: tuple[torch.Tensor, ...] = tensor.chunk(len(self.hf))
        return result

    def tp_shard(self, tensor: torch.Tensor, *, tp_rank: int, tp_size: int) -> torch.Tensor:
        """Cut out the part of a full Megatron ``tensor`` of one index that ``tp_rank`` of ``tp_size`` holds.

        Raises:
            ConfigurationError: ``tp_size`` does not divide the tensor.
        """
        if self.partition.dim is None:
            return tensor
        halves = tensor.chunk(2) if self.partition is Partition.GATE_UP else (tensor,)
        if any(half.shape[self.partition.dim] % tp_size for half in halves):
            raise ConfigurationError(
                f"--tensor-model-parallel-size {tp_size}: does not divide {self.key} of shape {tuple(tensor.shape)}; "
                f"expected a divisor of {halves[0].shape[self.partition.dim]}"
            )
        return torch.cat([half.chunk(tp_size, dim=self.partition.dim)[tp_rank] for half in halves])

    def tp_join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the ``shards`` of all ranks, in rank order, the inverse of :meth:`tp_shard`."""
        if self.partition.dim is None:
            return shards[0]
        if self.partition is Partition.GATE_UP:
            halves = [shard.chunk(2) for shard in shards]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(tuple(shards), dim=self.partition.dim)


class TensorTable:
    """Tensors of a family, in Hugging Face order: the embedding, a layer's tensors, the final norm, the output matrix.

    Args:
        entries: One :class:`TensorEntry` for each kind of tensor; the embedding and the output are among them.
    """

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self.entries = tuple(entries)
        self.by_key = {entry.key: entry for entry in self.entries}
        (self.embedding_name,) = self.by_key[EMBEDDING_KEY].hf
        """Hugging Face name of the embedding."""
        (self.output_name,) = self.by_key[OUTPUT_KEY].hf
        """Hugging Face name of the output matrix, which is the embedding in a tied model."""

    def model_entries(self, arch: Architecture) -> list[TensorEntry]:
        """Return the entries that a model of ``arch`` has."""
        return [entry for entry in self.entries if entry.present(arch)]

    def model_tensors(self, arch: Architecture) -> Iterator[tuple[TensorEntry, Index]]:
        """Yield every (entry, index) of the model: tensors before the layers, then layer by layer, then those after."""
        entries = self.model_entries(arch)
        layered = [entry for entry in entries if entry.per_layer]
        first = entries.index(layered[0])
        yield from ((entry, ()) for entry in entries[:first] if not entry.per_layer)
        for layer in range(arch.num_layers):
            for entry in layered:
                yield from ((entry, index) for index in entry.layer_indices(layer, arch))
        yield from ((entry, ()) for entry in entries[first:] if not entry.per_layer)

    def hf_shapes(self, arch: Architecture) -> dict[str, Shape]:
        """Return name and shape of every Hugging Face tensor of the model, in the order of :meth:`model_tensors`."""
        return {
            name: shape
            for entry, index in self.model_tensors(arch)
            for name, shape in zip(entry.hf_names(index), entry.hf_shapes(arch), strict=True)
        }

    def layer_parameters(self, layer: int, arch: Architecture, *, active: bool = False) -> int:
        """Return the number of parameters of ``layer``, over all tensor-parallel and expert-parallel ranks.

        Args:
            layer: Number of the layer in the model.
            arch: The model's sizes.
            active: Count only the experts that a token uses.
        """
        experts = arch.experts_per_token if active else arch.num_experts
        layered = [entry for entry in self.entries if entry.per_layer and layer in entry.layers(arch)]
        return sum(prod(entry.shape(arch)) * (experts if "expert" in entry.axes else 1) for entry in layered)

    def find_module_parameter(
        self, name: str, arch: Architecture | None = None, *, first_layer: int = 0
    ) -> tuple[TensorEntry, Index]:
        """Return the entry and index of a Megatron parameter by its name in memory, with either kind of layers.

        Local layers may call two entries the same: the norm that Transformer Engine fuses in dense layers alone. With
        ``arch`` only entries that the layer has are found.

        Args:
            name: Name as in ``GPTModel.named_parameters()``; ``module.`` prefixes of wrappers are skipped.
            arch: The model's sizes; None finds the first entry of the table that fits.
            first_layer: Number in the model of the pipeline stage's first layer.

        Returns:
            The entry, and the index in the model. Experts count within the expert-parallel rank.

        Raises:
            KeyError: The table does not know the name, or not in this layer.
        """
        bare = name
        while bare.startswith("module."):
            bare = bare.removeprefix("module.")
        for entry in self.entries:
            index = entry.find_index(bare)
            if index:
                index = (index[0] + first_layer, *index[1:])
            if index is not None and (arch is None or not index or index[0] in entry.layers(arch)):
                return entry, index
        raise KeyError(f"{name}: no tensor of this model family has this name in Megatron")


def layer_entry(
    key: str, hf: Sequence[str], partition: Partition, hf_shapes: Callable[[Architecture], tuple[Shape, ...]],
    *, te: str | None = None, local: str | None = None, hf_prefix: str = "model.layers.{layer}.",
    layers: Layers = every_layer,
) -> TensorEntry:  # fmt: skip
    """Return the entry of a tensor that every layer has, or those of ``layers``.

    ``decoder.layers.`` is put before ``key``, ``hf_prefix`` before each of ``hf``, and ``decoder.layers.{layer}.``
    before ``te`` and ``local``, which default to ``key``.
    """
    return TensorEntry(
        key=f"decoder.layers.{key}",
        hf=tuple(f"{hf_prefix}{name}" for name in hf),
        te=f"decoder.layers.{{layer}}.{te or key}",
        local=f"decoder.layers.{{layer}}.{local or key}",
        partition=partition,
        hf_shapes=hf_shapes,
        layers=layers,
    )


def model_entry(key: str, hf: str, partition: Partition, hf_shape: Callable[[Architecture], Shape]) -> TensorEntry:
    """Return the entry of a tensor that the model has once, and that is also called ``key`` in memory."""
    return TensorEntry(
        key=key, hf=(hf,), te=key, local=key, partition=partition, hf_shapes=lambda arch: (hf_shape(arch),)
    )
