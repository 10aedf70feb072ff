"""How sequences are packed into micro-batches of a limited number of tokens, and shared out among ranks.

All decisions follow from the lengths alone, so every rank that knows the lengths decides alike.
"""

import bisect
import heapq
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_camopd.config.settings import Settings, at_least, setting
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import LayoutSizes

_SHAPES = 8
"""Number of lengths that micro-batches may have on a GPU, whose kernels are planned anew for each."""


@dataclass(frozen=True, kw_only=True)
class PackingSettings(Settings):
    """CaMOPD micro-batches: whole sequences, packed up to a number of tokens, which replaces --micro-batch-size."""

    max_tokens_per_microbatch: int | None = setting(None, within=at_least(1))
    """tokens of a micro-batch, on all context-parallel ranks together (default: --seq-length, times --micro-batch-size
    if that is given); rounded up to what the layout needs"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check the range, and note what is said of --micro-batch-size, if it is given."""
        super().check(args, given)
        args.micro_batch_note = None
        if "micro_batch_size" in given:
            instead = f"{args.micro_batch_size} x --seq-length"
            if args.max_tokens_per_microbatch is not None:
                instead = str(args.max_tokens_per_microbatch)
            args.micro_batch_note = (
                f"--micro-batch-size {args.micro_batch_size}: microbatches are packed by tokens, up to "
                f"--max-tokens-per-microbatch {instead}"
            )

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check that the layers take packed sequences and that the longest one fits, and set the default."""
        if args.transformer_impl != "local" and not (args.bf16 or args.fp16):
            raise ConfigurationError(
                f"--transformer-impl {args.transformer_impl}: Transformer Engine's attention takes packed sequences in "
                "bf16 and fp16 alone; add --bf16, or give --transformer-impl local"
            )
        if args.max_tokens_per_microbatch is None:
            rows = 1 if args.micro_batch_note is None else args.micro_batch_size
            args.max_tokens_per_microbatch = args.seq_length * rows
        if args.max_tokens_per_microbatch < args.seq_length:
            raise ConfigurationError(
                f"--max-tokens-per-microbatch {args.max_tokens_per_microbatch}: must be at least {args.seq_length}, "
                "the length of the longest sequence, which is not cut"
            )


@dataclass(frozen=True, kw_only=True)
class PackingRule:
    """How sequences fill micro-batches.

    Attributes:
        max_tokens: Tokens of a micro-batch at most, padding included.
        sequence_multiple: Each sequence is padded to a multiple of this (context parallelism cuts it into chunks).
        total_multiple: A micro-batch is padded to a multiple of this (sequence parallelism cuts it into equal parts).
        context_ranks: Number of context-parallel ranks.
        context_rank: This rank's number among them.
    """

    max_tokens: int
    sequence_multiple: int = 1
    total_multiple: int = 1
    context_ranks: int = 1
    context_rank: int = 0

    @staticmethod
    def of(args: Namespace, context_rank: int) -> "PackingRule":
        """Read the rule from checked arguments."""
        context = LayoutSizes.of(args).context
        chunks = 2 * context if context > 1 else 1
        multiple = math.lcm(chunks, context * (args.tensor_model_parallel_size if args.sequence_parallel else 1))
        limit = PackingSettings.of(args).max_tokens_per_microbatch
        assert limit is not None, "set by PackingSettings.check_run"
        most = _rounded(limit, multiple)
        if accelerator.current().device.type == "cuda":
            multiple *= max(1, math.ceil(most / _SHAPES / multiple))
        return PackingRule(
            max_tokens=_rounded(most, multiple),
            sequence_multiple=chunks,
            total_multiple=multiple,
            context_ranks=context,
            context_rank=context_rank,
        )

    def padded(self, length: int) -> int:
        """Return the tokens that a sequence of ``length`` tokens takes up."""
        return _rounded(length, self.sequence_multiple)

    def padded_total(self, tokens: int) -> int:
        """Return the tokens of a micro-batch whose padded sequences have ``tokens`` together."""
        return _rounded(tokens, self.total_multiple)

    def bins(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the places of the sequences in each micro-batch.

        The longest comes first, and each goes where the least room is left over ("best fit decreasing"). One that is
        longer than the limit, which no stage lets through, gets a micro-batch of its own.
        """
        bins: list[list[int]] = []
        room: list[tuple[int, int]] = []  # of each bin that is not full, with its number, ascending
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            needed = self.padded(lengths[place])
            found = bisect.bisect_left(room, (needed, -1))
            if found < len(room):
                left, number = room.pop(found)
            else:
                left, number = max(self.max_tokens, needed), len(bins)
                bins.append([])
            bins[number].append(place)
            if left > needed:
                bisect.insort(room, (left - needed, number))
        return bins


@dataclass(frozen=True)
class SequenceCost:
    """Estimate of the time that a sequence of L tokens takes: ``linear`` L + ``attention`` L^2, in any unit."""

    linear: int
    attention: int

    @staticmethod
    def of(args: Namespace) -> "SequenceCost":
        """Count multiplications of a layer: of its matrices, and of causal attention (twice half a square).

        Of experts those that a token uses count; in a mixed model all layers are taken to have them.
        """
        queries = args.num_attention_heads * args.kv_channels
        groups = args.num_query_groups * args.kv_channels
        width = args.moe_router_topk * args.moe_ffn_hidden_size if args.num_experts else args.ffn_hidden_size
        matrices = args.hidden_size * (2 * queries + 2 * groups + 3 * width)
        return SequenceCost(matrices, queries)

    def __call__(self, length: int) -> int:
        """Return the estimate for a sequence of ``length`` tokens."""
        return length * (self.linear + length * self.attention)


def balanced(costs: Sequence[int], ranks: int, loads: list[int] | None = None) -> list[list[int]]:
    """Share items out so that no rank takes much longer than the others.

    The most expensive item first, each to the rank with the least to do so far ("longest processing time"); of equal
    ones to the one with the smallest load from before, then to the lowest.

    Args:
        costs: Cost of each item.
        ranks: Number of ranks.
        loads: Cost of what each rank does besides, or None; the items' costs are added.

    Returns:
        The places of each rank's items, in ascending order.
    """
    before = [0] * ranks if loads is None else loads
    heap = [(0, before[rank], rank) for rank in range(ranks)]
    heapq.heapify(heap)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        load, besides, rank = heapq.heappop(heap)
        shares[rank].append(place)
        heapq.heappush(heap, (load + costs[place], besides, rank))
    for load, _, rank in heap:
        before[rank] += load
    return [sorted(share) for share in shares]


def imbalance(shares: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Return the tokens of the rank with the most over the mean of all ranks; 1 if there are none.

    Sequences are shared out by cost, which grows faster than their tokens: long ones may leave it above 1.
    """
    tokens = [sum(lengths[place] for place in share) for share in shares]
    return max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else 1.0


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
