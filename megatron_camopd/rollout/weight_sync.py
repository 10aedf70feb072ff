"""Weight sync: the student as a stream of whole Hugging Face tensors, from any tensor- and pipeline-parallel layout.

Every rank goes through the model bucket by bucket. A bucket holds consecutive tensors of one pipeline stage. The ranks
of that stage send their shards as one flat buffer to the ranks of the other stages with the same tensor-parallel rank
(broadcast); then the tensor-parallel ranks of each stage exchange their shards (all-gather); then the family's table
joins the shards of a tensor and splits it into Hugging Face tensors. Every data-parallel replica does this for itself.
The only rounding is the cast to the engine's dtype, before the transfer.

Memory beside the model, with B = max(``bucket_bytes``, the largest Megatron tensor): the bucket, one of its tensors
joined and split, and what the consumer still holds of the bucket before (at TP1 a view of all of it). That is at most
4 B where one tensor fills a bucket and about 2 B where tensors are small, plus 50 MiB for the blocks of the checksums.
At TP1 and PP1 nothing is gathered: tensors are views of the parameters if these have the engine's dtype, and only Q, K
and V are copied, layer by layer.

Every pass is checked from end to end. The ranks that hold a tensor take the checksum of their parts of it, with the
bits of the engine's dtype, before anything is moved. Every rank takes the checksum of each tensor that it yields. At
the end of the pass the two are compared over all ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_camopd.errors import StaleEngineError
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.family import Family
from megatron_camopd.families.placement import Index
from megatron_camopd.families.table import Partition, TensorEntry, TensorTable
from megatron_camopd.rollout.checksum import checksum
from megatron_camopd.rollout.freshness import CheckedWeights, EngineWeights
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Layout

_Key = tuple[str, Index]


@dataclass(frozen=True)
class _Item:
    """One Megatron tensor, held by pipeline stage ``stage`` in shards of ``shape`` on its tensor-parallel ranks."""

    entry: TensorEntry
    index: Index
    stage: int
    shape: torch.Size

    @property
    def key(self) -> _Key:
        return self.entry.key, self.index

    @property
    def names(self) -> tuple[str, ...]:
        return self.entry.hf_names(self.index)


class WeightSource:
    """Source of the student's weights for an engine; implements :class:`~.vllm_engine.WeightSource`.

    Construction and every pass are collective over the world. The parameters must be current before a pass: with
    ``--overlap-param-gather`` Megatron gathers them late, so the trainer forces the gather after every update.

    Args:
        model: This rank's model chunks, DDP-wrapped or not.
        family: The student's model family.
        arch: The student's architecture.
        dtype: The engine's dtype.
        bucket_bytes: Bytes gathered at once, as whole tensors of that dtype; a larger tensor is a bucket of its own.
        recorder: Records what the engine receives, for :meth:`check`.
    """

    def __init__(
        self,
        model: Sequence[MegatronModule],
        family: Family,
        arch: Architecture,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        recorder: EngineWeights | None = None,
    ) -> None:
        self._table, self._arch, self._dtype = family.table, arch, dtype
        self._layout, self._recorder = Layout.current(), recorder
        self._device = accelerator.current().device
        self._held = _held_parameters(model, self._table, arch)
        self._buckets = _make_buckets(self._items(), self._gathered_bytes, bucket_bytes)
        self._outstanding: Iterator[tuple[str, Tensor]] = iter(())
        self.version = 0
        """Number of complete passes so far."""
        self.fingerprint: dict[str, int] = {}
        """Checksums of the tensors sent in the last complete pass, by Hugging Face name; the same on every rank."""

    @property
    def names(self) -> list[str]:
        """Hugging Face names of the tensors of a pass, in order.

        In a tied model the output matrix follows directly after the embedding, as the same tensor once more. Hugging
        Face's files do not hold it, but an engine may keep a copy of its own (packed, for example) and must receive it.
        """
        return [name for bucket in self._buckets for item in bucket for name in self._sent_names(item)]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole model in the engine's dtype; a tied output matrix is not counted twice."""
        shapes = self._table.hf_shapes(self._arch).values()
        return int(sum(torch.Size(shape).numel() for shape in shapes) * self._dtype.itemsize)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Begin a pass: an iterator over (name, whole tensor) in the order of :attr:`names`; collective over the world.

        The embedding and the output matrix have no padding rows. Tensors are read-only: they may be views of the
        parameters, which the next update changes. The ranks wait for each other, so every rank must finish the pass: a
        caller that may stop early or fail calls :meth:`complete` in a ``finally``. An unfinished pass is also completed
        when the iterator is closed and when the next pass begins.

        Raises:
            StaleEngineError: A tensor did not arrive as it was sent, or ranks that should hold the same weights do not;
                raised on all ranks at the end of the pass.
        """
        self.complete()
        self._outstanding = self._run_pass()
        return self._deliver()

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> CheckedWeights:
        """Compare the engine's ``parameters`` on this rank with what it received in the last pass.

        Needs no other rank.

        Raises:
            StaleEngineError: A tensor was not sent, or the engine holds something else; the error names it.
        """
        assert self._recorder is not None, "nothing was recorded"
        return self._recorder.check(parameters)

    def complete(self) -> None:
        """Finish the current pass, if one is unfinished; collective.

        Raises:
            StaleEngineError: See :meth:`tensors`.
        """
        for _ in self._outstanding:
            pass

    def _deliver(self) -> Iterator[tuple[str, Tensor]]:
        if self._recorder is not None:
            self._recorder.restart()
        try:
            for name, tensor in self._outstanding:
                if self._recorder is not None:
                    self._recorder.record(name, tensor)
                yield name, tensor
        finally:
            self.complete()

    @torch.no_grad()
    def _run_pass(self) -> Iterator[tuple[str, Tensor]]:
        sent: list[Tensor] = []
        received: list[Tensor] = []
        for bucket in self._buckets:
            sent += [value for item in bucket for value in self._own_checksums(item)]
            gathered = self._gather(bucket)
            for number, item in enumerate(bucket):
                shards = [shards[number] for shards in gathered]
                joined = shards[0]
                if len(shards) > 1:  # copies, since a view that is still in use would keep its bucket alive
                    joined = item.entry.tp_join(shards) if item.entry.partition.dim is not None else joined.clone()
                parts = list(item.entry.to_hf(joined, self._arch))
                received += [checksum(part) for part in parts]
                parts += parts if self._is_tied_head(item) else []
                # Drop the references, so that a tensor is freed as soon as the consumer drops it.
                del shards, joined
                for name in self._sent_names(item):
                    yield name, parts.pop(0)
            del gathered
        self._verify(torch.stack(sent), torch.stack(received))
        self.version += 1

    def _gather(self, bucket: Sequence[_Item]) -> list[list[Tensor]]:
        """Return for each tensor-parallel rank its shards of the bucket's tensors; collective over the replica."""
        if self._layout.tensor.size == self._layout.pipeline.size == 1:
            return [[self._held[item.key].detach().to(self._dtype) for item in bucket]]
        sizes = [item.shape.numel() for item in bucket]
        flat = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        stage = bucket[0].stage
        if stage == self._layout.pipeline.rank:
            for item, part in zip(bucket, flat.split(sizes), strict=True):
                part.view(item.shape).copy_(self._held[item.key])
        # As bytes: gloo does not know every dtype.
        if self._layout.pipeline.size > 1:
            dist.broadcast(flat.view(torch.uint8), self._layout.stage_rank(stage), group=self._layout.pipeline.group)
        if self._layout.tensor.size > 1:
            whole = torch.empty(self._layout.tensor.size * len(flat), dtype=self._dtype, device=self._device)
            dist.all_gather_into_tensor(
                whole.view(torch.uint8), flat.view(torch.uint8), group=self._layout.tensor.group
            )
            flat = whole
        return [
            [part.view(item.shape) for item, part in zip(bucket, ours.split(sizes), strict=True)]
            for ours in flat.view(self._layout.tensor.size, -1)
        ]

    def _own_checksums(self, item: _Item) -> list[Tensor]:
        """Return this rank's share of the checksum of each Hugging Face tensor of ``item``; 0 on the other stages."""
        if item.stage != self._layout.pipeline.rank:
            return [torch.zeros((), dtype=torch.int64, device=self._device)] * len(item.names)
        shard = self._held[item.key].detach()
        if item.entry.partition is Partition.VOCAB:
            first = self._layout.tensor.rank * len(shard)
            real = shard[: max(0, self._arch.vocab_size - first)]
            return [checksum(real, dtype=self._dtype, row=first)]
        values = []
        for part in item.entry.to_hf(shard, self._arch):
            # All shares have the same length, so a rank's share begins at its rank times that length.
            offset = [0, 0]
            if item.entry.partition.dim is not None:
                offset[item.entry.partition.dim] = self._layout.tensor.rank * part.shape[item.entry.partition.dim]
            values.append(checksum(part, dtype=self._dtype, row=offset[0], column=offset[1]))
        return values

    def _verify(self, shares: Tensor, received: Tensor) -> None:
        """Compare the checksums of what was sent with those of what arrived; collective over the world.

        Args:
            shares: [tensors] int64, this rank's share of the checksum of each tensor sent.
            received: [tensors] int64, checksum of each tensor as this rank yielded it.

        Raises:
            StaleEngineError: The two differ on some rank, or ranks that should hold the same copy do not; raised on all
                ranks.
        """
        names = [name for bucket in self._buckets for item in bucket for name in item.names]
        replicated = torch.tensor(
            [item.entry.partition is Partition.REPLICATED for bucket in self._buckets for item in bucket
             for _ in item.names], device=self._device,
        )  # fmt: skip
        copies = shares.new_empty(self._layout.tensor.size * len(shares))
        dist.all_gather_into_tensor(copies, shares, group=self._layout.tensor.group)
        copies = copies.view(self._layout.tensor.size, -1)
        sent = torch.where(replicated, copies[0], copies.sum(0))
        torn = replicated & (copies != copies[0]).any(0)
        dist.all_reduce(sent, group=self._layout.pipeline.group)
        # One maximum over the world shows what is wrong on any rank. For int64, min(x) = ~max(~x): replicas agree
        # where the maximum of ``sent`` equals its minimum.
        found = torch.stack([(sent != received).long(), torn.long(), sent, ~sent])
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        torn = found[1].bool() | (found[2] != ~found[3])
        for wrong, meaning in (
            (torn, "differs between ranks that should hold the same copy of it"),
            (found[0].bool(), "did not arrive as it was sent"),
        ):
            if wrong.any():
                bad = [name for name, flag in zip(names, wrong.tolist(), strict=True) if flag]
                more = f" (and {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
                raise StaleEngineError(f"weight sync: {bad[0]} {meaning}{more}; nothing was sampled with it")
        self.fingerprint = dict(zip(names, sent.tolist(), strict=True))
        if self._arch.tied:
            self.fingerprint[self._table.output_name] = self.fingerprint[self._table.embedding_name]

    def _items(self) -> list[_Item]:
        """Return all tensors in Hugging Face order, each with the pipeline stage that holds it; collective."""
        places: list[Any] = [None] * self._layout.pipeline.size
        mine = {key: tuple(parameter.shape) for key, parameter in self._held.items()}
        dist.all_gather_object(places, mine, group=self._layout.pipeline.group)
        items = []
        for entry, index in self._table.model_tensors(self._arch):
            holders = [stage for stage, held in enumerate(places) if (entry.key, index) in held]
            assert len(holders) == 1, f"{entry.key} at {index} is held by the pipeline stages {holders}"
            items.append(_Item(entry, index, holders[0], torch.Size(places[holders[0]][entry.key, index])))
        return items

    def _gathered_bytes(self, item: _Item) -> int:
        return int(item.shape.numel() * self._layout.tensor.size * self._dtype.itemsize)

    def _is_tied_head(self, item: _Item) -> bool:
        return self._arch.tied and item.entry.partition is Partition.VOCAB

    def _sent_names(self, item: _Item) -> tuple[str, ...]:
        return (*item.names, self._table.output_name) if self._is_tied_head(item) else item.names


def _held_parameters(model: Sequence[MegatronModule], table: TensorTable, arch: Architecture) -> dict[_Key, Tensor]:
    """Return this rank's parameters by canonical key and index in the whole model."""
    held: dict[_Key, Tensor] = {}
    for chunk in unwrap_model(list(model)):
        offset = get_transformer_layer_offset(chunk.config)
        for name, parameter in chunk.named_parameters():
            entry, index = table.find_module_parameter(name, arch, first_layer=offset)
            held[entry.key, index] = parameter
    return held


def _make_buckets(items: Sequence[_Item], size: Any, limit: int) -> list[list[_Item]]:
    """Group consecutive ``items`` of one stage into buckets.

    The sizes of a bucket's items add up to at most ``limit`` bytes; an item that is larger has a bucket of its own.
    """
    buckets: list[list[_Item]] = []
    filled = 0
    for item in items:
        if not buckets or buckets[-1][0].stage != item.stage or filled + size(item) > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(item)
        filled += size(item)
    return buckets
