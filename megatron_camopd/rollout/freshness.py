"""Does the rollout engine hold the student's weights of this step? Two proofs, and a warning in between.

Weights that can be read (on a GPU all of vLLM's) are compared bit by bit through checksums of the engine's own slices,
taken while the full tensors stream into it (:class:`EngineWeights`): one stale tensor, or half of a fused one, is
found however small its change. Where they cannot be read (on a CPU vLLM packs its matrices), and for what follows from
the weights (the prefix cache, a packed head), :func:`probe_engine` compares what the engine samples with what the
trainer thinks of it. That finds wrong weights, not weights that are wrong by less than the dtype's rounding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.errors import StaleEngineError
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.family import Family
from megatron_camopd.families.table import Partition, TensorEntry
from megatron_camopd.rollout.checksum import checksum
from megatron_camopd.runtime import accelerator

VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it cuts it into tensor-parallel blocks."""


class CheckedWeights(NamedTuple):
    """How many of the engine's parameters were compared, and how many it does not let us read."""

    checked: int
    unreadable: int


class _Slice(NamedTuple):
    """The part of a Hugging Face tensor that an engine rank holds: ``length`` of axis ``dim`` from ``start``."""

    dim: int
    start: int
    length: int

    def checksum(self, tensor: Tensor) -> Tensor:
        """Of ``tensor``, which is this slice."""
        return checksum(tensor, row=self.start if self.dim == 0 else 0, column=self.start if self.dim == 1 else 0)


class EngineWeights:
    """The weights that rank ``tp_rank`` of ``tp_size`` of a vLLM must hold after a weight sync.

    Every tensor on its way to the engine is recorded between two calls of :meth:`restart`; :meth:`check` then compares
    the engine's parameters with what was recorded. None of it needs another rank.
    """

    def __init__(self, family: Family, arch: Architecture, *, tp_rank: int, tp_size: int) -> None:
        self._family, self._arch, self._tp_rank, self._tp_size = family, arch, tp_rank, tp_size
        self._head = family.table.output_name
        self._slices = {
            name: self._slice(entry, number)
            for entry, index in family.table.model_tensors(arch)
            for number, name in enumerate(entry.hf_names(index))
        }
        if arch.tied:
            self._slices[self._head] = self._slices[family.table.embedding_name]
        self._expected: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def restart(self) -> None:
        """Forget what was recorded: a new set of weights is about to be sent."""
        self._expected, self._dtypes = {}, {}

    def record(self, name: str, tensor: Tensor) -> None:
        """Record the checksum of this rank's slice of the full ``tensor``, which is handed to the engine next."""
        place = self._slices[name]
        self._expected[name] = place.checksum(tensor.narrow(*place))
        self._dtypes[name] = tensor.dtype

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> CheckedWeights:
        """Compare ``parameters`` (``named_parameters()`` of the engine's model) with what was recorded.

        Empty parameters are packed elsewhere: unreadable. A tied model may leave out its head, which then is the
        embedding. Errors: StaleEngineError naming the tensor: not sent, missing, strange, of a wrong shape or dtype,
        or other bits.
        """
        unsent = [name for name in self._slices if name not in self._expected]
        if unsent:
            raise StaleEngineError(f"weight sync: {unsent[0]} was not sent; expected all {len(self._slices)} tensors")
        held = dict(parameters)
        checked, unreadable = 0, 0
        names: list[str] = []
        values: list[Tensor] = []
        for parameter, parts, rows in self._layout():
            tensor = held.pop(parameter, None)
            if tensor is None:
                if parameter == self._head and self._arch.tied:
                    continue
                raise StaleEngineError(f"rollout engine: has no parameter {parameter}")
            if not tensor.numel():
                unreadable += 1
                continue
            self._check_form(parameter, tensor, parts, rows)
            names += parts
            values += self._checksums(tensor, parts)
            checked += 1
        if held:
            raise StaleEngineError(f"rollout engine: has a parameter {next(iter(held))}, which no weight was sent for")
        if values:
            wrong = (torch.stack(values) != torch.stack([self._expected[name] for name in names])).tolist()
            stale = [name for name, flag in zip(names, wrong, strict=True) if flag]
            if stale:
                more = f" ({len(stale)} of {len(names)} tensors read)" if len(stale) > 1 else ""
                raise StaleEngineError(f"rollout engine: {stale[0]} is not what was sent{more}")
        return CheckedWeights(checked, unreadable)

    def _layout(self) -> Iterator[tuple[str, tuple[str, ...], int]]:
        """Each of the engine's parameters: its name, the tensors stacked in it, its rows."""
        for entry, index in self._family.table.model_tensors(self._arch):
            names = entry.hf_names(index)
            rows = sum(self._rows(entry, name) for name in names)
            yield self._family.vllm_name(entry, names), names, rows
            if self._arch.tied and entry.partition is Partition.VOCAB:
                yield self._head, (self._head,), rows

    def _rows(self, entry: TensorEntry, name: str) -> int:
        if entry.partition is Partition.VOCAB:
            return self._vocabulary_block()
        if entry.partition is Partition.ROW:
            return entry.hf_shapes(self._arch)[0][0]
        return self._slices[name].length

    def _check_form(self, parameter: str, tensor: Tensor, parts: Sequence[str], rows: int) -> None:
        place = self._slices[parts[0]]
        columns = place.length if place.dim == 1 else None
        if tensor.shape[0] != rows or columns not in (None, tensor.shape[-1]):
            raise StaleEngineError(
                f"rollout engine: {parameter} has shape {tuple(tensor.shape)}; expected {rows} rows"
                + (f" of {columns}" if columns else "")
            )
        if tensor.dtype is not self._dtypes[parts[0]]:
            raise StaleEngineError(
                f"rollout engine: {parameter} is {tensor.dtype}, but {self._dtypes[parts[0]]} was sent: rounded again"
            )

    def _checksums(self, tensor: Tensor, parts: Sequence[str]) -> Iterator[Tensor]:
        offset = 0
        for name in parts:
            place = self._slices[name]
            if place.dim == 1:
                yield place.checksum(tensor)
            else:
                yield place.checksum(tensor[offset : offset + place.length])
                offset += place.length

    def _vocabulary_block(self) -> int:
        padded = -(-self._arch.vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
        return padded // self._tp_size

    def _slice(self, entry: TensorEntry, number: int) -> _Slice:
        """What this rank holds of the ``number``-th Hugging Face tensor of ``entry``."""
        if entry.partition is Partition.VOCAB:
            block, last = self._vocabulary_block(), self._arch.vocab_size
            start, end = min(self._tp_rank * block, last), min((self._tp_rank + 1) * block, last)
            return _Slice(0, start, end - start)
        dim, shape = entry.partition.dim, entry.hf_shapes(self._arch)[number]
        if dim is None:
            return _Slice(0, 0, shape[0])
        cuts = self._tp_size
        if entry.partition is Partition.QKV and number > 0:
            cuts = min(cuts, self._arch.num_query_groups)  # neighbouring ranks share a key-value head
        length = shape[dim] // cuts
        return _Slice(dim, self._tp_rank * cuts // self._tp_size * length, length)


@dataclass(frozen=True)
class Tolerance:
    """Nats that log-probabilities of engine and trainer may differ by, on average and for any one token."""

    mean: float
    max: float


TOLERANCES = {
    torch.float32: Tolerance(2e-4, 1e-3),
    torch.float16: Tolerance(0.02, 0.2),
    torch.bfloat16: Tolerance(0.1, 1.0),
}
"""By the engine's dtype. Sound engines differ by their sums' order and by rounding: some 1e-5 in float32; in bfloat16,
whose logits of 16 to 32 lie 1/8 apart, 0.06 to 0.13 was measured for single tokens, more for unlikely ones and below a
temperature of 1. There single tokens prove little and the mean decides: a stale prefix cache was off by 8.6, a stale
head by 9.4, the wrong temperature by 1. float16 is 8 times finer than bfloat16."""


class ProbeResult(NamedTuple):
    """Largest over all ranks: mean and maximum of |log mu - log pi| over the tokens of a probe."""

    mean: float
    max: float


def probe_prompts(vocab_size: int, length: int, *, count: int = 4) -> list[list[int]]:
    """``count`` fixed prompts of ``length`` tokens, all different from their first token on.

    ``length`` should exceed one block of the engine's KV cache by a few tokens: only whole blocks are cached by prefix.
    """
    return [[(row * 7919 + place * 104729) % vocab_size for place in range(1, length + 1)] for row in range(count)]


def probe_engine(
    generate: Callable[[Sequence[Sequence[int]], Tensor], RolloutBatch],
    score: Callable[[RolloutBatch], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    tolerance: Tolerance,
) -> ProbeResult:
    """Let the engine answer ``prompts`` twice and compare its log-probabilities with the trainer's; collective.

    ``generate(prompts, indices)``: the engine's, for this step; ``score``: the trainer's log-probabilities [N, R] of
    a rollout, at the same temperature. The second answers come through the prefix cache. Stale entries of it are met
    by the first: those that the same prompts left before the weights changed, so the prompts must stay the same.

    Errors: StaleEngineError, on all ranks, with both figures; not a number counts as infinitely wrong.
    """
    differences = []
    for _ in range(2):
        rollout = generate(prompts, torch.arange(len(prompts)))
        difference = (rollout.rollout_logprobs.double() - score(rollout).double()).abs()
        differences.append(difference[rollout.response_mask])
    values = torch.cat(differences).nan_to_num(nan=math.inf)
    figures = torch.stack([values.mean(), values.max()]).to(accelerator.current().device)
    if dist.is_initialized():
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    result = ProbeResult(*figures.tolist())
    if result.mean > tolerance.mean or result.max > tolerance.max:
        raise StaleEngineError(
            f"rollout engine: its log-probabilities of a probe differ from the trainer's by {result.mean:.2g} nats on "
            f"average and {result.max:.2g} at most (allowed: {tolerance.mean:g} and {tolerance.max:g}); its weights or "
            "its prefix cache are not the student's, or it samples at another temperature"
        )
    return result


def mismatch_warning(record: dict[str, Any], usual: float) -> str | None:
    """A line for the console if a step's rollouts were, on average, more than ``usual`` nats from the trainer."""
    mean, largest = record["rollout_train_logprob_abs_diff"], record["rollout_train_logprob_abs_diff_max"]
    if mean <= usual:
        return None
    return (
        f"step {record['step']}: log-probabilities of rollout engine and trainer differ by {mean:.2g} nats on average "
        f"(up to {largest:.2g}; --rollout-mismatch-warning {usual:g}), effective samples "
        f"{record['importance_effective_fraction']:.0%}: importance weights are working hard"
    )
