"""Tables that convert the tensors of a Hugging Face model to those of a Megatron model, and back.

Each :class:`TensorEntry` relates the Hugging Face names of one Megatron tensor to its canonical sharded name (the key
in a torch_dist checkpoint), to the two names that it can have in memory, and to the way tensor parallelism cuts it. The
entries of a family form a :class:`TensorTable`. Import, export and the weight sync to the rollout engine all use it.

An entry stands for the same tensor of every layer (and expert); an index selects one of them: ``(layer,)``, ``(layer,
expert)``, or ``()`` for a tensor that the model has once. A checkpoint stacks the tensors of an entry: its first axes
are the numbers of the index.

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
from itertools import product
from math import prod

import torch

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.architecture import Architecture

Shape = tuple[int, ...]
Index = tuple[int, ...]

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"
_AXES = ("layer", "expert")  # the axes of an index, in this order


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
    """

    key: str
    hf: tuple[str, ...]
    te: str
    local: str
    partition: Partition
    hf_shapes: Callable[[Architecture], tuple[Shape, ...]]

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes of an index: those of ``layer`` and ``expert`` that occur in the entry's names."""
        return tuple(axis for axis in _AXES if f"{{{axis}}}" in self.te)

    @property
    def per_layer(self) -> bool:
        """Whether the model has such a tensor in every layer."""
        return "layer" in self.axes

    def present(self, arch: Architecture) -> bool:
        """Return whether a model of ``arch`` has this tensor: a tied model has no output matrix of its own."""
        return not (arch.tied and self.key == OUTPUT_KEY)

    def stacked(self, arch: Architecture) -> Shape:
        """Return the sizes of the axes of an index: ``()``, ``(L,)`` or ``(L, E)`` with L layers of E experts."""
        sizes = {"layer": arch.num_layers, "expert": arch.num_experts}
        return tuple(sizes[axis] for axis in self.axes)

    def indices(self, arch: Architecture) -> Iterator[Index]:
        """Iterate over every index of this tensor in a model of ``arch``."""
        return product(*map(range, self.stacked(arch)))

    def shape(self, arch: Architecture) -> Shape:
        """Return the shape of the Megatron tensor of one index, over all tensor-parallel ranks."""
        shapes = self.hf_shapes(arch)
        if self.partition is Partition.VOCAB:
            return (arch.padded_vocab_size, *shapes[0][1:])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def checkpoint_shape(self, arch: Architecture) -> Shape:
        """Return the global shape under ``key`` in a checkpoint: the axes of the index, then :meth:`shape`."""
        return (*self.stacked(arch), *self.shape(arch))

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
                yield from ((entry, index) for index in entry.indices(arch) if index[0] == layer)
        yield from ((entry, ()) for entry in entries[first:] if not entry.per_layer)

    def hf_shapes(self, arch: Architecture) -> dict[str, Shape]:
        """Return name and shape of every Hugging Face tensor of the model, in the order of :meth:`model_tensors`."""
        return {
            name: shape
            for entry, index in self.model_tensors(arch)
            for name, shape in zip(entry.hf_names(index), entry.hf_shapes(arch), strict=True)
        }

    def layer_parameters(self, arch: Architecture) -> int:
        """Return the number of parameters of one layer, over all tensor-parallel ranks and all experts."""
        layered = [entry for entry in self.model_entries(arch) if entry.per_layer]
        return sum(prod(entry.checkpoint_shape(arch)[1:]) for entry in layered)

    def find_module_parameter(self, name: str) -> tuple[TensorEntry, Index]:
        """Return the entry and index of a Megatron parameter by its name in memory, with either kind of layers.

        Args:
            name: Name as in ``GPTModel.named_parameters()``; ``module.`` prefixes of wrappers are skipped.

        Returns:
            The entry, and the index within the pipeline stage: the caller adds the stage's offset to the layer.

        Raises:
            KeyError: The table does not know the name.
        """
        bare = name
        while bare.startswith("module."):
            bare = bare.removeprefix("module.")
        for entry in self.entries:
            index = entry.find_index(bare)
            if index is not None:
                return entry, index
        raise KeyError(f"{name}: no tensor of this model family has this name in Megatron")


def layer_entry(
    key: str, hf: Sequence[str], partition: Partition, hf_shapes: Callable[[Architecture], tuple[Shape, ...]],
    *, te: str | None = None, local: str | None = None, hf_prefix: str = "model.layers.{layer}.",
) -> TensorEntry:  # fmt: skip
    """Return the entry of a tensor that every layer has.

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
    )


def model_entry(key: str, hf: str, partition: Partition, hf_shape: Callable[[Architecture], Shape]) -> TensorEntry:
    """Return the entry of a tensor that the model has once, and that is also called ``key`` in memory."""
    return TensorEntry(
        key=key, hf=(hf,), te=key, local=key, partition=partition, hf_shapes=lambda arch: (hf_shape(arch),)
    )


def fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: Architecture) -> torch.Tensor:
    """Interleave ``q`` [g r d, H], ``k`` [g d, H] and ``v`` [g d, H] by query group: [g (r + 2) d, H].

    Biases have no axis H. The letters are those of the module's docstring.
    """
    groups = k.shape[0] // arch.head_dim
    parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: torch.Tensor, arch: Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split ``qkv`` into q, k and v, the inverse of :func:`fuse_qkv`; it may hold any number of whole query groups.

    Raises:
        ValueError: ``qkv`` does not hold whole query groups.
    """
    query_rows = arch.num_heads // arch.num_query_groups * arch.head_dim
    group_rows = query_rows + 2 * arch.head_dim
    if qkv.shape[0] % group_rows:
        raise ValueError(f"linear_qkv of {qkv.shape[0]} rows holds no whole query groups of {group_rows} rows")
    grouped = qkv.reshape(-1, group_rows, *qkv.shape[1:])
    q, k, v = grouped.split((query_rows, arch.head_dim, arch.head_dim), dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zero rows, the padding of the vocabulary, to ``tensor`` [R, ...] until it has ``rows`` >= R rows."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])))
