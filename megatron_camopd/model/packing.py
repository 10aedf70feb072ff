"""How sequences are packed into micro-batches of a limited number of tokens, and shared out among ranks.

All decisions follow from the lengths alone, so every rank that knows the lengths decides alike.
"""

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
    """CaMOPD micro-batches: whole sequences, packed. --micro-batch-size, if given, is the largest number of them."""

    max_tokens_per_microbatch: int | None = setting(None, within=at_least(1))
    """tokens of a micro-batch, on all context-parallel ranks together (default: --seq-length, times --micro-batch-size
    if that is given); rounded up to what the layout needs"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check the range, and note whether the number of sequences in a micro-batch is limited."""
        super().check(args, given)
        args.max_sequences_per_microbatch = args.micro_batch_size if "micro_batch_size" in given else None

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check that the longest sequence fits, and set the default."""
        if args.max_tokens_per_microbatch is None:
            args.max_tokens_per_microbatch = args.seq_length * (args.max_sequences_per_microbatch or 1)
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
        max_sequences: Sequences of a micro-batch at most, or None.
        sequence_multiple: Each sequence is padded to a multiple of this (context parallelism cuts it into chunks).
        total_multiple: A micro-batch is padded to a multiple of this (sequence parallelism cuts it into equal parts).
        context_ranks: Number of context-parallel ranks.
        context_rank: This rank's number among them.
    """

    max_tokens: int
    max_sequences: int | None = None
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
        most = _rounded(PackingSettings.of(args).max_tokens_per_microbatch or args.seq_length, multiple)
        if accelerator.current().device.type == "cuda":
            multiple *= max(1, math.ceil(most / _SHAPES / multiple))
        return PackingRule(
            max_tokens=_rounded(most, multiple),
            max_sequences=args.max_sequences_per_microbatch,
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
        """Return the places of the sequences in each micro-batch: the longest first, each where it fits first."""
        bins: list[list[int]] = []
        free: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            needed = self.padded(lengths[place])
            assert needed <= self.max_tokens, f"{lengths[place]} tokens in a micro-batch of {self.max_tokens}"
            for number, room in enumerate(free):
                if needed <= room and (self.max_sequences is None or len(bins[number]) < self.max_sequences):
                    bins[number].append(place)
                    free[number] -= needed
                    break
            else:
                bins.append([place])
                free.append(self.max_tokens - needed)
        return bins


@dataclass(frozen=True)
class SequenceCost:
    """Estimate of the time that a sequence of L tokens takes: ``linear`` L + ``attention`` L^2, in any unit."""

    linear: int
    attention: int

    @staticmethod
    def of(args: Namespace) -> "SequenceCost":
        """Count multiplications of a layer: of its matrices, and of causal attention (twice half a square)."""
        queries = args.num_attention_heads * args.kv_channels
        groups = args.num_query_groups * args.kv_channels
        matrices = args.hidden_size * (2 * queries + 2 * groups + 3 * args.ffn_hidden_size)
        return SequenceCost(matrices, queries)

    def __call__(self, length: int) -> int:
        """Return the estimate for a sequence of ``length`` tokens."""
        return length * (self.linear + length * self.attention)


def balanced(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Share items out so that no rank takes much longer than the others.

    The most expensive item first, each to the rank with the least to do so far ("longest processing time"); of equal
    ones to the lowest.

    Args:
        costs: Cost of each item.
        ranks: Number of ranks.

    Returns:
        The places of each rank's items, in ascending order.
    """
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(place)
        heapq.heappush(loads, (load + costs[place], rank))
    return [sorted(share) for share in shares]


def imbalance(shares: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Return the tokens of the rank with the most over the mean of all ranks; 1 if there are none."""
    tokens = [sum(lengths[place] for place in share) for share in shares]
    return max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else 1.0


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
