"""What the head operations share: the columns a rank owns, token chunks, and the softmax of a row that lies in parts.

Letters: N tokens (C of them in a chunk), H hidden size, V columns a rank holds, K targets a token. Rank r of the
tensor-parallel group holds the columns [r V, (r + 1) V) of the padded vocabulary. Columns from ``valid_vocab_size`` on
are phantom: they pad the vocabulary to a size that divides. They are not masked but left out of every product, so they
take no part in the softmax and get no gradient.

A part of a row (a rank's shard, or a tile of it) is summed up by its maximum m, s = sum e^(z - m), u = sum (z - m)
e^(z - m) and its target logits: "partials", [C, 3 + K] fp32. Partials merge exactly, so that one collective a chunk
carries a softmax over shards; all ranks merge them in rank order, hence to the same bits.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

# fp32 logits of one chunk. CUDA: 4,096 rows of 151,936 columns, enough for full-speed products and few passes over the
# fp32 gradient of the weight. CPU: as many rows as keep the library's products fast, and a tenth of what a batch takes.
CHUNK_BYTES = {"cuda": 4096 * 151936 * 4, "cpu": 160 * 2**20}
CHUNK_TOKENS = 8192  # at most: products get no faster, and their 16-bit inputs and fp32 results count as well
CHUNK_MULTIPLE = 64  # tokens; products of odd sizes are slower


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """first: vocabulary id of this rank's first column; width: V; valid: real columns among them, the leading ones."""

    first: int
    width: int
    valid: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(weight: Tensor, valid_vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> "VocabShard":
        """The shard that ``weight`` [V, H] is on this rank of ``tp_group`` (None: the whole vocabulary).

        Raises ValueError when ``valid_vocab_size`` is not between 1 and the padded vocabulary size.
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
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def columns(self, targets: Tensor) -> Tensor:
        """This rank's columns of the ids ``targets`` (any shape), -1 where it does not own them."""
        columns = targets - self.first
        return columns.masked_fill((columns < 0) | (columns >= self.valid), -1)

    def gather(self, values: Tensor) -> Tensor:
        """``values`` (contiguous) of every rank of the group, stacked in rank order: one all-gather, none without."""
        if self.group is None:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values, group=self.group)
        return torch.stack(parts)


def check_head_inputs(hidden: Tensor, weight: Tensor, temperature: float, chunk_tokens: int | None) -> None:
    """Raise unless hidden is [N, H], weight [V, H], both fp32, bf16 or fp16, and temperature and chunk positive.

    TypeError for a dtype, ValueError for the rest.
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
    """Raise unless ``targets`` is int64 (TypeError) and [N] or [N, K] with N = ``tokens`` (ValueError)."""
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}; vocabulary ids are int64")
    if targets.dim() not in (1, 2) or targets.shape[0] != tokens:
        raise ValueError(f"targets {tuple(targets.shape)} is neither [N] nor [N, K] with N = {tokens}")


def chunk_size(count: int, width: int, device: torch.device) -> int:
    """Tokens a chunk when ``count`` of them meet ``width`` columns: chunks as equal as can be, CHUNK_BYTES at most."""
    limit = CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"] // (4 * max(width, 1))
    limit = min(max(limit // CHUNK_MULTIPLE * CHUNK_MULTIPLE or limit, 1), CHUNK_TOKENS)
    chunks = max(-(-count // limit), 1)
    return min(limit, max(-(-count // (chunks * CHUNK_MULTIPLE)), 1) * CHUNK_MULTIPLE)


def token_chunks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` over ``count`` tokens, the last one shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """Of rows over the whole vocabulary, fp32.

    top [C] the largest logit; log_mass [C] the log-sum-exp above it (their sum would lose digits of large logits);
    logprob [C, K] of the targets; entropy [C], nats.
    """

    top: Tensor
    log_mass: Tensor
    logprob: Tensor
    entropy: Tensor

    @staticmethod
    def of(partials: Tensor) -> "RowStatistics":
        """From the partials [C, 3 + K] of whole rows. A target that nobody owns has log-probability -inf."""
        top, mass, moment = partials[:, 0], partials[:, 1], partials[:, 2]
        log_mass = mass.log()
        return RowStatistics(
            top, log_mass, (partials[:, 3:] - top[:, None]) - log_mass[:, None], log_mass - moment / mass
        )


def merge_partials(parts: Tensor) -> Tensor:
    """Partials [P, C, 3 + K] of P parts of the same rows -> those of the rows [C, 3 + K]; NaN stays NaN."""
    tops = parts[:, :, 0]
    top = tops.amax(dim=0)
    shift = (tops - top).masked_fill(tops == -torch.inf, 0.0)  # a part of phantom columns alone adds nothing
    scale = shift.exp()
    mass = (parts[:, :, 1] * scale).sum(dim=0)
    moment = ((parts[:, :, 2] + shift * parts[:, :, 1]) * scale).sum(dim=0)
    return torch.cat([torch.stack([top, mass, moment], dim=1), parts[:, :, 3:].amax(dim=0)], dim=1)


def no_columns(count: int, targets: int, device: torch.device) -> Tensor:
    """Partials [count, 3 + targets] of rows without any column."""
    partials = torch.full((count, 3 + targets), -torch.inf, device=device)
    partials[:, 1:3] = 0.0
    return partials
