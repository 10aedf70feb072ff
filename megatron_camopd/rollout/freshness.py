"""Checks that the rollout engine holds the student's weights of the current step.

* :class:`EngineWeights` compares weights by checksums. While the whole tensors stream into the engine, it takes the
  checksum of each slice that this rank must hold; afterwards it compares them with the engine's parameters. It finds
  one stale tensor, or a stale half of a fused one, however small the change. It needs parameters that can be read:
  vLLM's can on a GPU; on a CPU, vLLM packs its matrices.
* :func:`probe_engine` compares log-probabilities: the engine samples responses to fixed prompts and the trainer scores
  them. It covers packed weights, and what is computed from weights, such as the prefix cache. It cannot find an error
  smaller than the rounding of the dtype.
* :func:`mismatch_warning` warns between probes when the rollouts of a step disagree with the trainer.
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
"""Multiple to which vLLM pads the vocabulary before it cuts it into tensor-parallel blocks."""


class CheckedWeights(NamedTuple):
    """Numbers of the engine's parameters: those that were compared, and those that cannot be read."""

    checked: int
    unreadable: int


class _Slice(NamedTuple):
    """Slice of a Hugging Face tensor on an engine rank: ``length`` entries of axis ``dim`` from ``start`` on."""

    dim: int
    start: int
    length: int

    def checksum(self, tensor: Tensor) -> Tensor:
        """Return the checksum of ``tensor``, which holds this slice alone."""
        return checksum(tensor, row=self.start if self.dim == 0 else 0, column=self.start if self.dim == 1 else 0)


class EngineWeights:
    """Checksums of the weights that one tensor-parallel rank of a vLLM engine must hold after a weight sync.

    For every sync: :meth:`restart`, then :meth:`record` for every tensor on its way to the engine, then :meth:`check`,
    which compares the engine's parameters with what was recorded. Needs no other rank.

    Args:
        family: The student's model family.
        arch: The student's architecture.
        tp_rank: This rank's number within its engine.
        tp_size: Number of tensor-parallel ranks of the engine.
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
        """Forget what was recorded, before a new set of weights is sent."""
        self._expected, self._dtypes = {}, {}

    def record(self, name: str, tensor: Tensor) -> None:
        """Record the checksum of this rank's slice of the whole ``tensor``, which the engine receives next."""
        place = self._slices[name]
        self._expected[name] = place.checksum(tensor.narrow(*place))
        self._dtypes[name] = tensor.dtype

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> CheckedWeights:
        """Compare the engine's parameters with what was recorded.

        An empty parameter counts as unreadable: vLLM keeps its values packed elsewhere. A tied model may lack the
        output matrix, which then is the embedding.

        Args:
            parameters: ``named_parameters()`` of the engine's model on this rank.

        Raises:
            StaleEngineError: A tensor was not sent, a parameter is missing or unknown, has a wrong shape or dtype, or
                other bits than what was sent; the error names it.
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
        """Yield the engine's parameters: name, Hugging Face tensors stacked in it, number of rows."""
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
        """Return the slice that this rank holds of the ``number``-th Hugging Face tensor of ``entry``."""
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
    """Largest allowed differences of log-probabilities, engine to trainer, in nats: on average and for one token."""

    mean: float
    max: float


TOLERANCES = {
    torch.float32: Tolerance(2e-4, 1e-3),
    torch.float16: Tolerance(0.02, 0.2),
    torch.bfloat16: Tolerance(0.1, 1.0),
}
"""Tolerances by the engine's dtype. An engine with the right weights still differs by the order of its sums and by
rounding. In float32 that is about 1e-5 nats. In bfloat16, where neighbouring logits between 16 and 32 are 1/8 apart,
0.06 to 0.13 nats were measured for single tokens, and more for unlikely tokens and for temperatures below 1. So in
bfloat16 single tokens prove little and the mean decides: it was 8.6 with a stale prefix cache, 9.4 with a stale output
matrix, and 1 with the wrong temperature. float16 is 8 times finer than bfloat16."""


class ProbeResult(NamedTuple):
    """Mean and maximum of |log mu - log pi| over the tokens of a probe, in nats; of each the largest over all ranks."""

    mean: float
    max: float


def probe_prompts(vocab_size: int, length: int, *, count: int = 4) -> list[list[int]]:
    """Return ``count`` fixed prompts of ``length`` token ids, each with another first token.

    ``length`` should exceed a block of the engine's KV cache by a few tokens: the prefix cache holds only whole blocks.
    """
    return [[(row * 7919 + place * 104729) % vocab_size for place in range(1, length + 1)] for row in range(count)]


def probe_engine(
    generate: Callable[[Sequence[Sequence[int]], Tensor], RolloutBatch],
    score: Callable[[RolloutBatch], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    tolerance: Tolerance,
) -> ProbeResult:
    """Sample responses to ``prompts`` twice and compare their log-probabilities with the trainer's; collective.

    The second pass is computed from the prefix cache that the first one filled. The first finds stale entries of the
    cache, left by the same prompts before the weights changed; so every probe must use the same prompts.

    Args:
        generate: Samples with the engine: (prompts, indices [N] int64) -> rollouts of the current step.
        score: Returns the trainer's log-probabilities [N, R] of a rollout, at the same temperature.
        prompts: Token ids of the N prompts, from :func:`probe_prompts`.
        tolerance: Largest differences that are allowed.

    Raises:
        StaleEngineError: The difference exceeds the tolerance on some rank; raised on all ranks, with both figures.
            A NaN counts as infinite.
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
    """Return a warning if the rollout and training log-probabilities of a step differ too much, else None.

    Args:
        record: The metrics of the step.
        usual: Mean absolute difference in nats up to which nothing is reported.
    """
    mean, largest = record["rollout_train_logprob_abs_diff"], record["rollout_train_logprob_abs_diff_max"]
    if mean <= usual:
        return None
    return (
        f"step {record['step']}: log-probabilities of rollout engine and trainer differ by {mean:.2g} nats on average "
        f"(up to {largest:.2g}; --rollout-mismatch-warning {usual:g}), effective samples "
        f"{record['importance_effective_fraction']:.0%}: importance weights are working hard"
    )
