"""The output head and the distillation loss in one pass over the tokens.

    loss = - sum_n c_n w_n v_n A_n logprob_n,    logprob_n = log softmax(W x_n / T)[y_n]
    A_n = max(teacher_n - logprob_n, floor),     w_n = importance weight of exp(logprob_n - rollout_n)

A, w, v and c carry no gradient, so d loss / d logprob_n = - c_n w_n v_n A_n is known as soon as a token's
log-probability is. Choice made: the forward pass therefore finishes the gradients of hidden and weight chunk by chunk,
and the backward pass only scales them: 3 matrix products, logits of one chunk at a time, nothing computed twice. The
price is a gradient buffer (fp32 of the weight's shape) during the forward pass. It needs c_n complete beforehand:
1 / (|S| L_i) counts over the whole global batch (``objective.weights``).

The importance weight is spelled out here rather than taken from ``objective.importance``: it belongs to the row
operation, and the objective stays the independent reference that tests hold this file to.
Tensor contract and vocabulary shards: see ``kernels.vocab_parallel``.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels.vocab_parallel import (
    VocabShard,
    add_weight_gradient,
    check_head_inputs,
    chunk_logits,
    hidden_gradient,
    row_statistics,
    token_chunks,
)


@dataclasses.dataclass(frozen=True)
class _Feedback:
    """What turns a token's log-probability into its share of the gradient; tensors are [N] fp32."""

    teacher_logprobs: Tensor
    rollout_logprobs: Tensor
    coefficients: Tensor
    importance: tuple[str, float, float]
    advantage_floor: float | None

    def of(self, rows: slice, logprob: Tensor) -> Tensor:
        """c w v A of the tokens in ``rows`` [C]; exactly 0 where c, v or w is 0, whatever the other factors hold."""
        mode, low, high = self.importance
        advantage = self.teacher_logprobs[rows] - logprob
        if self.advantage_floor is not None:
            advantage = advantage.clamp(min=self.advantage_floor)
        factor = self.coefficients[rows]
        if mode != "none":
            ratio = torch.exp(logprob - self.rollout_logprobs[rows])
            # Comparisons with NaN are false: a NaN ratio stays and shows up in the loss.
            ratio = ratio.clamp(max=high) if mode == "clip" else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
            factor = torch.where(factor == 0.0, factor, factor * ratio)
        return torch.where(factor == 0.0, 0.0, factor * advantage)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How to run: what is not a tensor of the problem."""

    temperature: float
    shard: VocabShard
    chunk_tokens: int | None
    wants_hidden: bool
    wants_weight: bool
    reduce_hidden_grad: bool


def _logits_gradient(exponentials: Tensor, scale: Tensor, feedback: Tensor, targets: Tensor, plan: _Plan) -> Tensor:
    """d loss / d logits [C, valid] = c w v A / T (p - onehot), written over ``exponentials``."""
    strength = feedback / plan.temperature
    grad_logits = exponentials.mul_((strength * scale)[:, None])
    columns, owned = plan.shard.local(targets[:, None])
    grad_logits.scatter_add_(1, columns, -strength[:, None].masked_fill(~owned, 0.0))
    return grad_logits.masked_fill_((feedback == 0.0)[:, None], 0.0)  # rows of padding may hold NaN


class _DistillHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, feedback: _Feedback, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        shard = plan.shard
        real = weight[: shard.valid]
        logprob = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if plan.wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if plan.wants_weight else None
        for rows in token_chunks(hidden.shape[0], shard.width, plan.chunk_tokens):
            logits = chunk_logits(hidden[rows], real).div_(plan.temperature)
            statistics, exponentials = row_statistics(logits, targets[rows, None], shard)
            logprob[rows] = statistics.logprob[:, 0]
            strength = feedback.of(rows, logprob[rows])
            idle = strength == 0.0
            loss -= (strength * logprob[rows]).masked_fill(idle, 0.0).sum(dtype=torch.float64)
            if not shard.valid or not (plan.wants_hidden or plan.wants_weight):
                continue
            grad_logits = _logits_gradient(exponentials, statistics.local_scale, strength, targets[rows], plan)
            if grad_hidden is not None:
                grad_hidden[rows] = hidden_gradient(grad_logits, real)
            if grad_weight is not None:
                inputs = hidden[rows].masked_fill(idle[:, None], 0.0)  # 0 * NaN would spoil the whole weight
                add_weight_gradient(grad_weight[: shard.valid], grad_logits, inputs)
        if grad_hidden is not None and plan.reduce_hidden_grad and shard.group is not None:
            dist.all_reduce(grad_hidden, group=shard.group)
        ctx.save_for_backward(_for_backward(grad_hidden, hidden), _for_backward(grad_weight, weight))
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(logprob)
        ctx.set_materialize_grads(False)
        return loss.float(), logprob

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * 5
        scaled = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None, None


def _for_backward(grad: Tensor | None, source: Tensor) -> Tensor | None:
    """The finished gradient as it waits: in its input's dtype, but fp32 for fp16 until the loss scale lifts it."""
    return grad if grad is None or source.dtype == torch.float16 else grad.to(source.dtype)


def distill_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_logprobs: Tensor,
    rollout_logprobs: Tensor,
    coefficients: Tensor,
    *,
    importance: tuple[str, float, float] = ("mask", 0.5, 5.0),
    advantage_floor: float | None = None,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loss of the module docstring, differentiable in ``hidden`` and ``weight``, and the log-probabilities.

    hidden: [N, H] float (bf16, fp16, fp32), the same on every rank of ``tp_group``; N may be 0.
    weight: [V, H] float, this rank's V columns of the padded vocabulary (all of them without ``tp_group``).
    targets: [N] int64 vocabulary ids. teacher_logprobs, rollout_logprobs: [N] float, nats.
    coefficients: [N] float, c_n = r_b / (|S| L_i); 0 drops a token (padding), whatever its other inputs hold, NaN
    included.
    importance: (mode, low, high), mode mask, clip or none, as ``objective.importance_weights``.
    advantage_floor: lower limit of A_n, nats. token_weights: v_n, [N] float; None: all 1.
    temperature, valid_vocab_size, chunk_tokens, reduce_hidden_grad: as for ``linear_logprob``.

    Returns (loss, fp32 scalar; logprob, [N] fp32, nats, without graph), the same on every rank. The gradient to weight
    sums in fp32 and comes back in its dtype. Raises ValueError for shapes or settings that do not fit.
    """
    check_head_inputs(hidden, weight, temperature, chunk_tokens)
    if importance[0] not in ("mask", "clip", "none"):
        raise ValueError(f"importance mode is {importance[0]!r}; it must be mask, clip or none")
    rows = {"targets": targets, "teacher_logprobs": teacher_logprobs, "rollout_logprobs": rollout_logprobs}
    rows |= {"coefficients": coefficients} | ({} if token_weights is None else {"token_weights": token_weights})
    for name, value in rows.items():
        if value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; ({hidden.shape[0]},) is expected")

    strength = coefficients.detach().float()
    if token_weights is not None:
        # Tokens without a coefficient may hold any weight, NaN included.
        strength = torch.where(strength == 0.0, strength, strength * token_weights.detach().float())
    feedback = _Feedback(
        teacher_logprobs.detach().float(), rollout_logprobs.detach().float(), strength, importance, advantage_floor
    )
    # Asked here, because inside an autograd function gradients always look switched off.
    tracking = torch.is_grad_enabled()
    plan = _Plan(
        temperature,
        VocabShard.of(weight, valid_vocab_size, tp_group),
        chunk_tokens,
        wants_hidden=tracking and hidden.requires_grad,
        wants_weight=tracking and weight.requires_grad,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    loss, logprob = _DistillHead.apply(hidden, weight, targets, feedback, plan)
    return loss, logprob
