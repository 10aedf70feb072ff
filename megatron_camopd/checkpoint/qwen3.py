"""Dense Qwen3: the one table of its tensors (the architecture itself is read in ``qwen3_config``).

Each :class:`TensorEntry` of :data:`TABLE` ties the Hugging Face names of one Megatron tensor to its canonical sharded
name (the key in a torch_dist checkpoint), to both spellings it has in memory and to the way tensor parallelism
cuts it. Import, export and the weight sync to the rollout engine all go through this table and nothing else.

Tensor contract, with H hidden, F feed-forward, n query heads, g query groups, r = n / g, d head dimension, V
vocabulary, V' padded vocabulary, for ONE layer (a checkpoint stacks the L layers on a leading axis):

    linear_qkv.weight   [g (r + 2) d, H]   per query group: its r query heads, its key head, its value head
    linear_proj.weight  [H, n d]
    linear_fc1.weight   [2 F, H]           gate rows, then up rows (a tensor-parallel rank holds [gate_r; up_r])
    linear_fc2.weight   [H, F]
    embedding, output   [V', H]            rows >= V are zeros in a checkpoint and are cut for Hugging Face

Conversions only move rows: they are exact in every dtype and undo each other bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from megatron_camopd.checkpoint.qwen3_config import Qwen3Architecture, architecture_args, read_architecture
from megatron_camopd.errors import ConfigurationError

__all__ = [
    "TABLE",
    "Partition",
    "Qwen3Architecture",
    "Shape",
    "TensorEntry",
    "architecture_args",
    "find_module_parameter",
    "fuse_qkv",
    "hf_shapes",
    "model_tensors",
    "pad_rows",
    "read_architecture",
    "split_qkv",
]

Shape = tuple[int, ...]


class Partition(Enum):
    """How tensor parallelism cuts a tensor (one layer, no layer axis)."""

    REPLICATED = "every rank holds all of it"
    VOCAB = "rows, one block of padded vocabulary per rank"
    QKV = "rows, interleaved by query group, so equal blocks of rows hold whole groups"
    GATE_UP = "rows of the gate and rows of the up projection separately: a rank holds [gate_r; up_r]"
    ROW = "columns (the input dimension)"

    @property
    def dim(self) -> int | None:
        """Axis that is cut, None if replicated."""
        return {Partition.REPLICATED: None, Partition.ROW: 1}.get(self, 0)


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    ``key`` is Megatron's canonical sharded name, ``hf`` the Hugging Face names, ``te`` and ``local`` the names in
    memory with Transformer Engine layers and with local layers; ``{layer}`` stands for the layer (in memory: the
    index within the pipeline stage). ``hf_shapes`` gives the Hugging Face shapes in the order of ``hf``.
    """

    key: str
    hf: tuple[str, ...]
    te: str
    local: str
    partition: Partition
    hf_shapes: Callable[[Qwen3Architecture], tuple[Shape, ...]]

    @property
    def per_layer(self) -> bool:
        """Whether the model has one such tensor per layer; its checkpoint key then has a leading layer axis."""
        return "{layer}" in self.te

    def present(self, arch: Qwen3Architecture) -> bool:
        """Whether a model of ``arch`` has this tensor: a tied model has no output matrix of its own."""
        return not (arch.tied and self.key == "output_layer.weight")

    def shape(self, arch: Qwen3Architecture) -> Shape:
        """Shape of the Megatron tensor of one layer, over all tensor-parallel ranks."""
        shapes = self.hf_shapes(arch)
        if self.partition is Partition.VOCAB:
            return (arch.padded_vocab_size, *shapes[0][1:])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def checkpoint_shape(self, arch: Qwen3Architecture) -> Shape:
        """Global shape under ``key`` in a checkpoint: ``[L, ...]`` if the tensor is per layer."""
        return (arch.num_layers, *self.shape(arch)) if self.per_layer else self.shape(arch)

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        """Hugging Face names of the parts, for ``layer`` (None where the tensor is not per layer)."""
        return tuple(name.format(layer=layer) for name in self.hf)

    def to_megatron(self, parts: Sequence[torch.Tensor], arch: Qwen3Architecture) -> torch.Tensor:
        """Join the Hugging Face ``parts`` (order of ``hf``) of one layer into the Megatron tensor :meth:`shape`."""
        if self.partition is Partition.QKV:
            return fuse_qkv(parts[0], parts[1], parts[2], arch)
        if self.partition is Partition.VOCAB:
            return pad_rows(parts[0], arch.padded_vocab_size)
        return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]

    def to_hf(self, tensor: torch.Tensor, arch: Qwen3Architecture) -> tuple[torch.Tensor, ...]:
        """Inverse of :meth:`to_megatron`; accepts any padding of the vocabulary.

        Q, K and V of a tensor-parallel shard with whole query groups come out as that rank's rows of q, k and v.
        """
        if self.partition is Partition.QKV:
            return split_qkv(tensor, arch)
        if self.partition is Partition.VOCAB:
            return (tensor[: arch.vocab_size],)
        return tensor.chunk(len(self.hf))

    def tp_shard(self, tensor: torch.Tensor, *, tp_rank: int, tp_size: int) -> torch.Tensor:
        """The part of a full Megatron ``tensor`` of one layer that ``tp_rank`` of ``tp_size`` holds."""
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
        """Inverse of :meth:`tp_shard`: the full Megatron tensor from the ``shards`` of all ranks, in rank order."""
        if self.partition.dim is None:
            return shards[0]
        if self.partition is Partition.GATE_UP:
            halves = [shard.chunk(2) for shard in shards]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(tuple(shards), dim=self.partition.dim)


def fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: Qwen3Architecture) -> torch.Tensor:
    """Interleave ``q`` [g r d, H], ``k`` [g d, H] and ``v`` [g d, H] by query group: [g (r + 2) d, H]."""
    groups = k.shape[0] // arch.head_dim
    parts = [part.reshape(groups, -1, part.shape[-1]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: torch.Tensor, arch: Qwen3Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse of :func:`fuse_qkv`, for all query groups or for any number of whole ones."""
    query_rows = arch.num_heads // arch.num_query_groups * arch.head_dim
    group_rows = query_rows + 2 * arch.head_dim
    if qkv.shape[0] % group_rows:
        raise ValueError(f"linear_qkv of {qkv.shape[0]} rows holds no whole query groups of {group_rows} rows")
    grouped = qkv.reshape(-1, group_rows, qkv.shape[-1])
    q, k, v = grouped.split((query_rows, arch.head_dim, arch.head_dim), dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """``tensor`` [R, ...] followed by zero rows up to ``rows`` >= R: the phantom part of the vocabulary."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])))


def _layer_entry(
    key: str, hf: Sequence[str], partition: Partition, hf_shapes: Callable[[Qwen3Architecture], tuple[Shape, ...]],
    *, local: str | None = None,
) -> TensorEntry:  # fmt: skip
    return TensorEntry(
        key=f"decoder.layers.{key}",
        hf=tuple(f"model.layers.{{layer}}.{name}.weight" for name in hf),
        te=f"decoder.layers.{{layer}}.{key}",
        local=f"decoder.layers.{{layer}}.{local or key}",
        partition=partition,
        hf_shapes=hf_shapes,
    )


def _model_entry(
    key: str, hf: str, partition: Partition, hf_shape: Callable[[Qwen3Architecture], Shape]
) -> TensorEntry:
    return TensorEntry(
        key=key, hf=(hf,), te=key, local=key, partition=partition, hf_shapes=lambda arch: (hf_shape(arch),)
    )


TABLE: tuple[TensorEntry, ...] = (
    _model_entry(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", Partition.VOCAB,
        lambda a: (a.vocab_size, a.hidden_size),
    ),
    _layer_entry(
        "self_attention.linear_qkv.layer_norm_weight", ["input_layernorm"], Partition.REPLICATED,
        lambda a: ((a.hidden_size,),), local="input_layernorm.weight",
    ),
    _layer_entry(
        "self_attention.linear_qkv.weight", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], Partition.QKV,
        lambda a: tuple((n * a.head_dim, a.hidden_size) for n in (a.num_heads, a.num_query_groups, a.num_query_groups)),
    ),
    _layer_entry(
        "self_attention.q_layernorm.weight", ["self_attn.q_norm"], Partition.REPLICATED, lambda a: ((a.head_dim,),)
    ),
    _layer_entry(
        "self_attention.k_layernorm.weight", ["self_attn.k_norm"], Partition.REPLICATED, lambda a: ((a.head_dim,),)
    ),
    _layer_entry(
        "self_attention.linear_proj.weight", ["self_attn.o_proj"], Partition.ROW,
        lambda a: ((a.hidden_size, a.num_heads * a.head_dim),),
    ),
    _layer_entry(
        "mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm"], Partition.REPLICATED,
        lambda a: ((a.hidden_size,),), local="pre_mlp_layernorm.weight",
    ),
    _layer_entry(
        "mlp.linear_fc1.weight", ["mlp.gate_proj", "mlp.up_proj"], Partition.GATE_UP,
        lambda a: ((a.ffn_hidden_size, a.hidden_size),) * 2,
    ),
    _layer_entry(
        "mlp.linear_fc2.weight", ["mlp.down_proj"], Partition.ROW, lambda a: ((a.hidden_size, a.ffn_hidden_size),)
    ),
    _model_entry(
        "decoder.final_layernorm.weight", "model.norm.weight", Partition.REPLICATED, lambda a: (a.hidden_size,)
    ),
    _model_entry(
        "output_layer.weight", "lm_head.weight", Partition.VOCAB, lambda a: (a.vocab_size, a.hidden_size)
    ),
)  # fmt: skip


def model_tensors(arch: Qwen3Architecture) -> Iterator[tuple[TensorEntry, int | None]]:
    """Every (entry, layer) of the model in Hugging Face order: embedding, layer by layer, final norm, output."""
    before = [entry for entry in TABLE[:1] if entry.present(arch)]
    layered = [entry for entry in TABLE if entry.per_layer]
    after = [entry for entry in TABLE[1:] if not entry.per_layer and entry.present(arch)]
    yield from ((entry, None) for entry in before)
    yield from ((entry, layer) for layer in range(arch.num_layers) for entry in layered)
    yield from ((entry, None) for entry in after)


def hf_shapes(arch: Qwen3Architecture) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor of the model, in Hugging Face order."""
    return {
        name: shape
        for entry, layer in model_tensors(arch)
        for name, shape in zip(entry.hf_names(layer), entry.hf_shapes(arch), strict=True)
    }


def find_module_parameter(name: str) -> tuple[TensorEntry, int | None]:
    """The entry and layer of an in-memory Megatron parameter, in either spelling.

    ``name`` is as in ``GPTModel.named_parameters()``; ``module.`` prefixes of wrappers are skipped. The layer counts
    within the pipeline stage: add the stage's offset. Errors: KeyError for a name the table does not know.
    """
    bare = name
    while bare.startswith("module."):
        bare = bare.removeprefix("module.")
    match = re.search(r"\.layers\.(\d+)\.", bare)
    layer = int(match.group(1)) if match else None
    pattern = re.sub(r"\.layers\.\d+\.", ".layers.{layer}.", bare, count=1)
    for entry in TABLE:
        if pattern in (entry.te, entry.local):
            return entry, layer
    raise KeyError(f"{name}: no Qwen3 tensor has this name in Megatron")
