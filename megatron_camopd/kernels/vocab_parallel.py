"""What the head operations share: the columns a rank owns, token chunks, fp32 products, and softmax over a sharded row.

Letters: N tokens (C of them in a chunk), H hidden size, V columns a rank holds, K targets a token. Rank r of the
tensor-parallel group holds the columns [r V, (r + 1) V) of the padded vocabulary. Columns from ``valid_vocab_size`` on
are phantom: they pad the vocabulary to a size that divides. They are not masked but left out of every product, so they
take no part in the softmax and get no gradient.

Choice made: logits are fp32 whatever the inputs' dtype (bf16 logits err by up to 0.1 nat on peaked rows, as much as the
gaps to be measured). On CUDA the matrix units take bf16 and accumulate in fp32; elsewhere the operands are widened, the
weight one block of rows at a time so that it is never copied whole.

A row's softmax over shards takes one collective: every rank sends its maximum m, s = sum e^(z - m), u = sum (z - m)
e^(z - m) and its target logits, [C, 3 + K] fp32, and all combine them in rank order, hence to the same bits.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # fp32 logits of one chunk
WEIGHT_BLOCK_BYTES = 16 * 2**20  # fp32 copy of one block of weight rows


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

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's columns of the ids ``targets`` (any shape), 0 where it does not own them, and where it does."""
        columns = targets - self.first
        owned = (columns >= 0) & (columns < self.valid)
        return columns.masked_fill(~owned, 0), owned


@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """Of a chunk's rows, over the whole vocabulary, fp32.

    top [C] the largest logit; log_mass [C] the log-sum-exp above it (their sum would lose digits of large logits);
    logprob [C, K] of the targets; entropy [C], nats; local_scale [C] turns this rank's exponentials into probabilities.
    """

    top: Tensor
    log_mass: Tensor
    logprob: Tensor
    entropy: Tensor
    local_scale: Tensor


def check_head_inputs(hidden: Tensor, weight: Tensor, temperature: float, chunk_tokens: int | None) -> None:
    """Raise ValueError unless hidden is [N, H], weight [V, H], the temperature positive and the chunk at least 1."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not [N, H] and [V, H]")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")


def token_chunks(count: int, width: int, chunk_tokens: int | None) -> Iterator[slice]:
    """Consecutive slices over ``count`` tokens; without ``chunk_tokens``, of about CHUNK_BYTES of fp32 logits."""
    size = max(1, CHUNK_BYTES // (4 * width)) if chunk_tokens is None else chunk_tokens
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _on_matrix_units(left: Tensor, right: Tensor) -> bool:
    """Whether both are of one 16-bit dtype on a device that multiplies them with an fp32 result."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)


def _weight_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of ``weight`` in fp32: one view when it is fp32 already, else small copies."""
    rows = weight.shape[0]
    step = max(rows, 1) if weight.dtype == torch.float32 else max(1, WEIGHT_BLOCK_BYTES // (4 * weight.shape[1]))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        yield block, weight[block].float()


def chunk_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [C, H] times weight [V, H] transposed, [C, V] fp32."""
    if _on_matrix_units(hidden, weight):
        return _matrix_product(hidden, weight.t())
    wide = hidden.float()
    logits = wide.new_empty(hidden.shape[0], weight.shape[0])
    for block, values in _weight_blocks(weight):
        logits[:, block] = wide @ values.t()
    return logits


def narrowed(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``values`` (fp32, not empty) times a power of two in the 16-bit ``dtype``, and that scale [] fp32 (None: 1).

    bf16 has the exponents of fp32. fp16 ends at 6e-8, and no loss scale has lifted these gradients yet: there the
    largest magnitude is brought to [2^14, 2^15), and all within 2^-28 of it keep full precision. Dividing an fp32
    product by the scale is exact. The scale stays on the device: reading it would wait for the queue.
    """
    if dtype != torch.float16:
        return values.to(dtype), None
    exponent = torch.frexp(values.abs().amax()).exponent
    scale = torch.ldexp(values.new_ones(()), (15 - exponent).clamp(-126, 127))
    return (values * scale).to(dtype), scale


def _matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] times right [K, N], both of one 16-bit dtype on CUDA: [M, N] fp32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def hidden_gradient(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """grad_logits [C, V] fp32 times weight [V, H], [C, H] fp32: this rank's part of the sum over the vocabulary."""
    if _on_matrix_units(weight, weight):
        narrow, scale = narrowed(grad_logits, weight.dtype)
        product = _matrix_product(narrow, weight)
        return product if scale is None else product.div_(scale)
    result = grad_logits.new_zeros(grad_logits.shape[0], weight.shape[1])
    for block, values in _weight_blocks(weight):
        result.addmm_(grad_logits[:, block], values)
    return result


def add_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total [V, H] fp32 += grad_logits [C, V] fp32 transposed times hidden [C, H]; with fp16, one more buffer of it."""
    if not _on_matrix_units(hidden, hidden):
        total.addmm_(grad_logits.t(), hidden.float())
        return
    narrow, scale = narrowed(grad_logits, hidden.dtype)
    if scale is None:
        torch.addmm(total, narrow.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total += _matrix_product(narrow.t(), hidden).div_(scale)


def row_statistics(logits: Tensor, targets: Tensor, shard: VocabShard) -> tuple[RowStatistics, Tensor]:
    """Softmax statistics of rows whose columns are spread over the group, and this rank's exponentials.

    logits: [C, valid] fp32, tempered; overwritten. targets: [C, K] int64, vocabulary ids; one that no rank owns
    (phantom or out of range) has probability zero, hence log-probability -inf. Returns the statistics and e [C, valid]
    fp32; the probabilities are ``e * local_scale[:, None]``. One all-gather over ``shard.group``, none without.
    """
    count, kinds = targets.shape
    packed = logits.new_full((count, 3 + kinds), -torch.inf)
    if shard.valid:
        columns, owned = shard.local(targets)
        packed[:, 3:] = logits.gather(1, columns).masked_fill(~owned, -torch.inf)
        top = logits.amax(dim=1, keepdim=True)
        exponentials = logits.sub_(top).exp()
        packed[:, 0:1] = top
        packed[:, 1] = exponentials.sum(dim=1)
        packed[:, 2] = logits.mul_(exponentials).sum(dim=1)
    else:
        exponentials = logits
        packed[:, 1:3] = 0.0

    parts = [packed]
    if shard.group is not None:
        parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(parts, packed, group=shard.group)
    gathered = torch.stack(parts)  # [ranks, C, 3 + K]
    tops = gathered[:, :, 0]
    top = tops.amax(dim=0)
    shift = (tops - top).masked_fill(tops == -torch.inf, 0.0)  # a rank of phantom columns alone adds nothing
    scale = shift.exp()
    mass = (gathered[:, :, 1] * scale).sum(dim=0)
    moment = ((gathered[:, :, 2] + shift * gathered[:, :, 1]) * scale).sum(dim=0)
    log_mass = mass.log()
    logprob = (gathered[:, :, 3:].amax(dim=0) - top[:, None]) - log_mass[:, None]
    own_shift = (packed[:, 0] - top).masked_fill(packed[:, 0] == -torch.inf, 0.0)
    return RowStatistics(top, log_mass, logprob, log_mass - moment / mass, own_shift.exp() / mass), exponentials
