"""Shared tools of the head operations: vocabulary shards, token chunks, and softmax over a sharded row.

Letters: N tokens (C of them in a chunk), H hidden size, V columns per rank, K targets per token. Rank r of the
tensor-parallel group holds the columns [r V, (r + 1) V) of the padded vocabulary. Columns from ``valid_vocab_size`` on
are phantom: they pad the vocabulary so that the group size divides it. They are left out of every product, so they take
no part in the softmax and get no gradient.

The "partials" of a part of a row (a rank's shard or a tile of it), [3 + K] fp32 per row, are its maximum m,
s = sum e^(z - m), u = sum (z - m) e^(z - m), and the K target logits, -inf for targets that other parts own. The
partials of all parts determine the softmax of the whole row, so one all-gather per chunk suffices. All ranks merge
partials in rank order and thus get identical bits.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

# Size of the fp32 logits of one chunk. CUDA: 4,096 rows of 151,936 columns, enough for products at full speed and few
# passes over the fp32 gradient of the weight. CPU: enough rows for fast products.
CHUNK_BYTES = {"cuda": 4096 * 151936 * 4, "cpu": 160 * 2**20}
CHUNK_TOKENS = 8192  # upper limit: more make products no faster, but their operands and results larger
CHUNK_MULTIPLE = 64  # tokens; products of odd sizes are slower


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """Columns of the vocabulary that one rank holds.

    Attributes:
        first: vocabulary id of the first column.
        width: number of columns, V, phantom ones included.
        valid: number of real columns; they come before the phantom ones.
        group: the tensor-parallel group, or None if this rank holds the whole vocabulary.
    """

    first: int
    width: int
    valid: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(weight: Tensor, valid_vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> "VocabShard":
        """Make the shard of ``weight`` [V, H] on this rank of ``tp_group`` (None: the whole vocabulary).

        Raises:
            ValueError: ``valid_vocab_size`` is not between 1 and the padded vocabulary size.
        """
        rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
        width = weight.shape[0]
        vocab = width * size if valid_vocab_size is None else valid_vocab_size
        if not 0 < vocab <= width * size:
            raise ValueError(f"valid_vocab_size is {vocab}; the weights hold {width * size} columns")
        first = rank * width
        return VocabShard(first, width, min(max(vocab - first, 0), width), tp_group if size > 1 else None)

    @property
    def size(self) -> int:
        """Number of ranks that the vocabulary is sharded over."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def columns(self, targets: Tensor) -> Tensor:
        """Return this rank's columns of the ids ``targets`` (any shape), -1 for ids that it does not own."""
        columns = targets - self.first
        return columns.masked_fill((columns < 0) | (columns >= self.valid), -1)

    def gather(self, values: Tensor) -> Tensor:
        """All-gather ``values`` (contiguous) over the group, stacked in rank order along a new first dimension."""
        if self.group is None:
            return values[None]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values, group=self.group)
        return torch.stack(gathered)


def check_head_inputs(hidden: Tensor, weight: Tensor, temperature: float, chunk_tokens: int | None) -> None:
    """Check the inputs that the head operations have in common.

    Raises:
        TypeError: ``hidden`` or ``weight`` is not fp32, bf16 or fp16.
        ValueError: ``hidden`` and ``weight`` are not [N, H] and [V, H], or ``temperature`` or ``chunk_tokens`` is not
            positive.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} is {value.dtype}; it must be float32, bfloat16 or float16")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not [N, H] and [V, H]")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")


def check_targets(targets: Tensor, tokens: int) -> None:
    """Check dtype and shape of ``targets``.

    Raises:
        TypeError: they are not int64.
        ValueError: they are neither [N] nor [N, K] with N = ``tokens``.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}; vocabulary ids are int64")
    if targets.dim() not in (1, 2) or targets.shape[0] != tokens:
        raise ValueError(f"targets {tuple(targets.shape)} is neither [N] nor [N, K] with N = {tokens}")


def chunk_size(count: int, width: int, device: torch.device) -> int:
    """Return the number of tokens per chunk for ``count`` tokens and logits of ``width`` columns.

    Chunks are about equally large, and their fp32 logits take at most CHUNK_BYTES.
    """
    limit = CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"] // (4 * max(width, 1))
    limit = min(max(limit // CHUNK_MULTIPLE * CHUNK_MULTIPLE or limit, 1), CHUNK_TOKENS)
    chunks = max(-(-count // limit), 1)
    return min(limit, max(-(-count // (chunks * CHUNK_MULTIPLE)), 1) * CHUNK_MULTIPLE)


def token_chunks(count: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of ``size`` tokens over ``count`` tokens; the last one may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """Softmax statistics of C rows over the whole vocabulary, fp32.

    Attributes:
        top: [C], largest logit m of the row.
        log_mass: [C], log sum e^(z - m). Adding m would give the log-sum-exp, but lose precision for large logits.
        logprob: [C, K], log-probabilities of the targets, nats.
        entropy: [C], nats.
    """

    top: Tensor
    log_mass: Tensor
    logprob: Tensor
    entropy: Tensor

    @staticmethod
    def of(partials: Tensor) -> "RowStatistics":
        """Make the statistics from the partials [C, 3 + K] of whole rows.

        A target outside the vocabulary has log-probability -inf.
        """
        top, mass, moment = partials[:, 0], partials[:, 1], partials[:, 2]
        log_mass = mass.log()
        return RowStatistics(
            top, log_mass, (partials[:, 3:] - top[:, None]) - log_mass[:, None], log_mass - moment / mass
        )


def merge_partials(partials: Tensor) -> Tensor:
    """Merge the partials [P, C, 3 + K] of all P parts of the rows into those of the whole rows, [C, 3 + K].

    A row with NaN in any part gets NaN.
    """
    tops = partials[:, :, 0]
    top = tops.amax(dim=0)
    shift = (tops - top).masked_fill(tops == -torch.inf, 0.0)  # a part without real columns adds nothing
    scale = shift.exp()
    mass = (partials[:, :, 1] * scale).sum(dim=0)
    moment = ((partials[:, :, 2] + shift * partials[:, :, 1]) * scale).sum(dim=0)
    return torch.cat([torch.stack([top, mass, moment], dim=1), partials[:, :, 3:].amax(dim=0)], dim=1)


def no_columns(count: int, targets: int, device: torch.device) -> Tensor:
    """Return the partials [count, 3 + targets] of rows without any column."""
    partials = torch.full((count, 3 + targets), -torch.inf, device=device)
    partials[:, 1:3] = 0.0
    return partials
