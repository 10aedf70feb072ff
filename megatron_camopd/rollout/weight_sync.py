"""The student's weights as a stream of whole Hugging Face tensors, from any tensor- and pipeline-parallel layout.

Every rank of the world walks through the model bucket by bucket. A bucket holds consecutive tensors of one pipeline
stage. The shards that a rank of that stage holds go as one flat buffer to the same tensor-parallel rank of the other
stages (broadcast), then the tensor-parallel ranks of each stage exchange theirs (all-gather), and the family's
table puts the shards together and takes them apart into Hugging Face tensors. Data-parallel replicas each do so for
themselves. Bytes are moved, never rounded: the one cast, to the engine's dtype, happens before the transfer.

Memory beside the model, with B = max(``bucket_bytes``, the largest Megatron tensor): the bucket, one tensor of it
joined and taken apart, and what the consumer still holds of the bucket before (at TP1 a view of all of it): 4 B at
most where one tensor fills a bucket, some 2 B where they are small; and 50 MiB for the blocks of the checksums. At
TP1 and PP1 there are no buckets: tensors are views of the parameters where the dtype is the engine's, and only Q, K
and V are copied, layer by layer.

Every pass is checked from end to end. The holders of a tensor take the checksum of their rows of it before anything
is cast or moved, every rank takes that of what it yields, and at the end of the pass both are compared, over all ranks.
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
from megatron_camopd.families.table import Index, Partition, TensorEntry, TensorTable
from megatron_camopd.rollout.checksum import checksum
from megatron_camopd.rollout.freshness import CheckedWeights, EngineWeights
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Layout

_Key = tuple[str, Index]


@dataclass(frozen=True)
class _Item:
    """One Megatron tensor: ``stage`` holds it, in shards of ``shape`` on its tensor-parallel ranks."""

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
    """Yields the weights of ``model`` (this rank's Megatron chunks, DDP-wrapped or not) to an engine.

    ``dtype``: the engine's. ``bucket_bytes``: how much is gathered at once, in whole tensors of that dtype; a larger
    tensor is a bucket of its own. ``recorder``: notes what the engine is handed, for :meth:`check`. Construction is
    collective over the world; so is every pass.

    The parameters must be current: with ``--overlap-param-gather`` Megatron gathers them late, and the trainer forces
    it to after every update.
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
        self._held = _held_parameters(model, self._table)
        self._buckets = _make_buckets(self._items(), self._gathered_bytes, bucket_bytes)
        self._outstanding: Iterator[tuple[str, Tensor]] = iter(())
        self.version = 0
        """Complete passes so far."""
        self.fingerprint: dict[str, int] = {}
        """Checksum of each tensor as sent in the last complete pass, by name: the same on every rank."""

    @property
    def names(self) -> list[str]:
        """The names of a pass in its order: Hugging Face's, a tied model's head right behind the embedding it is.

        A tied model's head is the embedding once more, by reference: no Hugging Face file has it, but an engine that
        keeps a head of its own (packed, say) must be told.
        """
        return [name for bucket in self._buckets for item in bucket for name in self._sent_names(item)]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole model in the engine's dtype; a tied head is not counted twice."""
        shapes = self._table.hf_shapes(self._arch).values()
        return sum(torch.Size(shape).numel() for shape in shapes) * self._dtype.itemsize

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) in the order of :attr:`names`, on every rank; real vocabulary rows only.

        Tensors are read-only: they may be views of the parameters, which the next update changes. The ranks wait for
        each other, so every rank must come to the end of the pass: whoever may stop early, or fail, calls
        :meth:`complete` in a ``finally``. A pass that is left is completed when the iterator is closed, or when the
        next one is asked for.

        Errors: StaleEngineError on all ranks, at the end of the pass, if a tensor did not arrive as it was sent or if
        ranks that should hold the same weights do not.
        """
        self.complete()
        self._outstanding = self._run_pass()
        return self._deliver()

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> CheckedWeights:
        """Compare the engine's ``parameters`` on this rank with what it was handed in the last pass.

        Needs no other rank.

        Raises:
            StaleEngineError: naming a tensor that was not handed over, or is not what it was.
        """
        assert self._recorder is not None, "nothing was recorded"
        return self._recorder.check(parameters)

    def complete(self) -> None:
        """Do what is left of the current pass, if anything. Errors: as :meth:`tensors`."""
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
                if len(shards) > 1:  # copies, lest a norm that the consumer still holds keep its whole bucket alive
                    joined = item.entry.tp_join(shards) if item.entry.partition.dim is not None else joined.clone()
                parts = list(item.entry.to_hf(joined, self._arch))
                received += [checksum(part) for part in parts]
                parts += parts if self._is_tied_head(item) else []
                # The consumer may hold a tensor; this frame must not, while it works for the next.
                del shards, joined
                for name in self._sent_names(item):
                    yield name, parts.pop(0)
            del gathered
        self._verify(torch.stack(sent), torch.stack(received))
        self.version += 1

    def _gather(self, bucket: Sequence[_Item]) -> list[list[Tensor]]:
        """For each tensor-parallel rank its shards of the bucket's tensors."""
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
        """This rank's share of the checksum of each Hugging Face tensor of ``item``; zero on the other stages."""
        if item.stage != self._layout.pipeline.rank:
            return [torch.zeros((), dtype=torch.int64, device=self._device)] * len(item.names)
        shard = self._held[item.key].detach()
        if item.entry.partition is Partition.VOCAB:
            first = self._layout.tensor.rank * len(shard)
            real = shard[: max(0, self._arch.vocab_size - first)]
            return [checksum(real, dtype=self._dtype, row=first)]
        values = []
        for part in item.entry.to_hf(shard, self._arch):
            # Every cut is even, so a rank's share begins at its rank times the share's length.
            offset = [0, 0]
            if item.entry.partition.dim is not None:
                offset[item.entry.partition.dim] = self._layout.tensor.rank * part.shape[item.entry.partition.dim]
            values.append(checksum(part, dtype=self._dtype, row=offset[0], column=offset[1]))
        return values

    def _verify(self, shares: Tensor, received: Tensor) -> None:
        """Compare what was sent ([tensors] int64, shares of this rank) with what arrived, on all ranks alike."""
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
        # One maximum over the world finds what is wrong anywhere; where all replicas agree, max(x) = ~max(~x).
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
        """All tensors in Hugging Face order, with the stage that really holds each; collective."""
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
        return item.shape.numel() * self._layout.tensor.size * self._dtype.itemsize

    def _is_tied_head(self, item: _Item) -> bool:
        return self._arch.tied and item.entry.partition is Partition.VOCAB

    def _sent_names(self, item: _Item) -> tuple[str, ...]:
        return (*item.names, self._table.output_name) if self._is_tied_head(item) else item.names


def _held_parameters(model: Sequence[MegatronModule], table: TensorTable) -> dict[_Key, Tensor]:
    """This rank's parameters by canonical key and index in the whole model."""
    held: dict[_Key, Tensor] = {}
    for chunk in unwrap_model(list(model)):
        offset = get_transformer_layer_offset(chunk.config)
        for name, parameter in chunk.named_parameters():
            entry, index = table.find_module_parameter(name)
            held[entry.key, (index[0] + offset, *index[1:]) if index else index] = parameter
    return held


def _make_buckets(items: Sequence[_Item], size: Any, limit: int) -> list[list[_Item]]:
    """Runs of consecutive ``items`` of one stage whose sizes add up to at most ``limit``, or of a single larger one."""
    buckets: list[list[_Item]] = []
    filled = 0
    for item in items:
        if not buckets or buckets[-1][0].stage != item.stage or filled + size(item) > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(item)
        filled += size(item)
    return buckets
