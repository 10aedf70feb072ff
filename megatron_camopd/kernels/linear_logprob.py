"""Log-probabilities of given tokens and the entropy, computed from hidden states and the output weight.

    z_n = W x_n / T;   logprob_{n,k} = z_{n, y_{n,k}} - log sum_v e^{z_{n,v}};   entropy_n = - sum_v p_{n,v} log p_{n,v}

Design choice: logits exist for one chunk of tokens at a time, and the backward pass computes them again. That takes 4
matrix products instead of 3, but the upstream gradient need not be known in advance. In training it is known, and
``distill_head`` saves that product. Letters, partials and vocabulary shards are explained in
``kernels.vocab_parallel``.
"""

import dataclasses
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels import top_ids
from megatron_camopd.kernels.head_gradients import HeadGradients
from megatron_camopd.kernels.products import empty_logits, gradient_dtype, logits_into, tile_columns
from megatron_camopd.kernels.rows import row_operations
from megatron_camopd.kernels.vocab_parallel import (
    RowStatistics,
    VocabShard,
    check_head_inputs,
    check_targets,
    chunk_size,
    merge_partials,
    no_columns,
    token_chunks,
)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Options of one call to ``linear_logprob``."""

    temperature: float
    shard: VocabShard
    chunk_tokens: int | None
    top_k: int
    reduce_hidden_grad: bool


class _LinearLogprob(torch.autograd.Function):
    """Autograd function whose backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        shard, count = plan.shard, hidden.shape[0]
        real, columns = weight[: shard.valid], shard.columns(targets)
        statistics = torch.empty(count, 3 + targets.shape[1], dtype=torch.float32, device=hidden.device)
        keys = torch.empty(count, plan.top_k, dtype=torch.int64, device=hidden.device)
        tile = tile_columns(shard.valid, hidden.device)
        for rows in token_chunks(count, plan.chunk_tokens or chunk_size(count, tile, hidden.device)):
            partials = _read_rows(hidden[rows], real, columns[rows], plan, keys[rows])
            statistics[rows] = merge_partials(shard.gather(partials))
        whole = RowStatistics.of(statistics)
        top = top_ids.merge(shard.gather(keys)) if plan.top_k else keys
        ctx.save_for_backward(hidden, weight, targets, whole.top, whole.log_mass)
        ctx.plan = plan
        ctx.mark_non_differentiable(whole.entropy, top)
        ctx.set_materialize_grads(False)
        return whole.logprob, whole.entropy, top

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, plan = grad_outputs[0], ctx.plan
        if upstream is None:
            return None, None, None, None
        hidden, weight, targets, top, log_mass = ctx.saved_tensors
        shard, count, upstream = plan.shard, hidden.shape[0], upstream.float()
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        gradients = HeadGradients.allocate(hidden, weight, shard, wants_hidden, grad_weight)
        size = plan.chunk_tokens or chunk_size(count, shard.valid, hidden.device)
        workspace = empty_logits(min(size, count), shard.valid, hidden.device)
        columns, operations = shard.columns(targets), row_operations(hidden.device.type)
        dtype = gradient_dtype(hidden, weight)
        for rows in token_chunks(count if shard.valid else 0, size):
            logits = logits_into(workspace[: rows.stop - rows.start], hidden[rows], weight[: shard.valid])
            grad_logits = operations.softmax_gradient(
                logits, columns[rows], top[rows], log_mass[rows], upstream[rows], 1.0 / plan.temperature, dtype
            )
            gradients.add(rows, grad_logits, idle=(upstream[rows] == 0.0).all(dim=1))
        grad_hidden = gradients.finished_hidden(plan.reduce_hidden_grad)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def _read_rows(hidden: Tensor, weight: Tensor, columns: Tensor, plan: _Plan, keys: Tensor) -> Tensor:
    """Compute the partials [C, 3 + K] of this rank's columns, one tile of columns at a time.

    Args:
        hidden: [C, H].
        weight: [valid, H].
        columns: [C, K] int64, this rank's columns of the targets; -1 where another rank owns one.
        plan: the options of the call.
        keys: [C, top_k] int64, overwritten with the keys of this rank's largest logits (``top_ids``).
    """
    width, operations = weight.shape[0], row_operations(hidden.device.type)
    tile = tile_columns(width, hidden.device)
    workspace = empty_logits(hidden.shape[0], tile, hidden.device)
    partials, candidates = [], []
    for start in range(0, width, tile):
        block = weight[start : start + tile]
        logits = logits_into(workspace[:, : len(block)], hidden, block)
        local = columns - start
        local = local.masked_fill((columns < 0) | (local < 0) | (local >= len(block)), -1)
        partials.append(operations.partial_statistics(logits, local, 1.0 / plan.temperature))
        if plan.top_k:
            candidates.append(top_ids.largest(logits, plan.shard.first + start, plan.top_k))
    if plan.top_k:
        keys[:] = top_ids.largest_keys(candidates, hidden.shape[0], plan.top_k, hidden.device)
    if not partials:
        return no_columns(columns.shape[0], columns.shape[1], hidden.device)
    return partials[0] if len(partials) == 1 else merge_partials(torch.stack(partials))


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    top_k: Literal[0] = 0,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    top_k: int,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    top_k: int = 0,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, ...]:
    """Compute log-probabilities of targets and the entropy under softmax(hidden weight^T / temperature).

    Only the log-probabilities are differentiable, in ``hidden`` and ``weight``; their upstream gradient must be the
    same on every rank. Gradients are summed in fp32 and returned in the dtype of their input.

    Args:
        hidden: [N, H] fp32, bf16 or fp16, the same on every rank of ``tp_group``; N may be 0.
        weight: [V, H] fp32, bf16 or fp16, this rank's V columns of the padded vocabulary (all of them without
            ``tp_group``).
        targets: [N] or [N, K] int64 vocabulary ids; a phantom or out-of-range id has log-probability -inf.
        temperature: divides the logits.
        valid_vocab_size: real size of the vocabulary; columns from there on are phantom. None: no phantom columns.
        tp_group: the tensor-parallel group that shards the vocabulary, or None.
        top_k: number of most likely ids to return for each token.
        chunk_tokens: number of tokens whose logits exist at a time; None for ``vocab_parallel.chunk_size``.
        reduce_hidden_grad: whether to sum the gradient of ``hidden`` over the group. With False it stays this rank's
            partial sum, for a caller that reduces (and scatters) it.

    Returns:
        (logprob, fp32 shaped like ``targets``; entropy, [N] fp32), in nats; with ``top_k`` also ids [N, top_k] int64 in
        order of decreasing probability, of equally likely ones the smaller id first. All are the same on every rank.
        A row whose logits hold NaN or +inf has NaN as log-probabilities and entropy.

    Raises:
        ValueError: shapes or settings do not fit.
        TypeError: a dtype is not supported.
    """
    check_head_inputs(hidden, weight, temperature, chunk_tokens)
    check_targets(targets, hidden.shape[0])
    shard = VocabShard.of(weight, valid_vocab_size, tp_group)
    vocab = weight.shape[0] * shard.size if valid_vocab_size is None else valid_vocab_size
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k is {top_k}; it must lie between 0 and the vocabulary size {vocab}")
    plan = _Plan(temperature, shard, chunk_tokens, top_k, reduce_hidden_grad)
    columns = targets[:, None] if targets.dim() == 1 else targets
    logprob, entropy, ids = _LinearLogprob.apply(hidden, weight, columns, plan)
    logprob = logprob.view(targets.shape)
    return (logprob, entropy, ids) if top_k else (logprob, entropy)
