"""The output head and the distillation loss in one pass over the tokens.

    loss = - sum_n c_n w_n v_n A_n logprob_n,    logprob_n = log softmax(W x_n / T)[y_n]
    A_n = max(teacher_n - logprob_n, floor),     w_n = importance weight of exp(logprob_n - rollout_n)

A, w, v and c carry no gradient, so d loss / d logprob_n = - c_n w_n v_n A_n is known as soon as a token's
log-probability is. Choice made: the forward pass therefore finishes the gradients of hidden and weight chunk by chunk,
and the backward pass only hands them on: 3 matrix products, logits of one chunk at a time, nothing computed twice. It
needs c_n complete beforehand: 1 / (|S| L_i) counts over the whole global batch (``objective.weights``). Where the
gradient that the loss itself will receive is known too, the weight's share goes straight into the caller's fp32 buffer
(``weight_gradient``, Megatron's ``main_grad``); else a buffer of the weight's shape waits for the backward pass.

Tensor contract and vocabulary shards: see ``kernels.vocab_parallel``; what happens to a row: ``kernels.rows``.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels.head_gradients import HeadGradients
from megatron_camopd.kernels.products import empty_logits, gradient_dtype, logits_into
from megatron_camopd.kernels.row_operations import RECORD, Feedback
from megatron_camopd.kernels.rows import row_operations
from megatron_camopd.kernels.vocab_parallel import (
    VocabShard,
    check_head_inputs,
    check_targets,
    chunk_size,
    no_columns,
    token_chunks,
)

_FEEDBACK, _LOSS = RECORD.index("feedback"), RECORD.index("loss")


class TokenMetrics(NamedTuple):
    """What the row operation computed of each token, [N] fp32: entropy and gap A in nats, the importance weight w, the
    feedback c w v A and the token's share of the loss. Entries of tokens whose coefficient is 0 mean nothing."""

    entropy: Tensor
    gap: Tensor
    importance: Tensor
    feedback: Tensor
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How to run: what is not a tensor of the problem. weight_gradient: where the weight's gradient is added, or None;
    else wants_weight makes a buffer for autograd."""

    temperature: float
    shard: VocabShard
    chunk_tokens: int | None
    wants_hidden: bool
    wants_weight: bool
    weight_gradient: Tensor | None
    reduce_hidden_grad: bool


class _DistillHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, feedback: Feedback, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        grad_weight = plan.weight_gradient
        if plan.wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        gradients = HeadGradients.of(hidden, weight, plan.shard, plan.wants_hidden, grad_weight)
        records = _run(gradients, targets, feedback, plan)
        grad_hidden = gradients.finished_hidden(plan.reduce_hidden_grad)
        waiting = None if plan.weight_gradient is not None else grad_weight
        ctx.save_for_backward(
            _for_backward(grad_hidden, hidden), _for_backward(waiting, weight), feedback.gradient_scale
        )
        ctx.known_ahead = plan.weight_gradient is not None
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(records)
        ctx.set_materialize_grads(False)
        loss = records[:, _LOSS].sum(dtype=torch.float64)
        return loss.float(), records

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * 5
        grad_hidden, grad_weight, expected = ctx.saved_tensors
        if ctx.known_ahead:  # checked on the device: reading it here would wait for the queue
            torch._assert_async((grad_loss == expected).all(), "the loss received another gradient than loss_gradient")
        else:
            grad_hidden, grad_weight = (None if x is None else x * grad_loss for x in (grad_hidden, grad_weight))
        finished = [None if x is None else x.to(t) for x, t in zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)]
        return finished[0], finished[1], None, None, None


def _run(gradients: HeadGradients, targets: Tensor, feedback: Feedback, plan: _Plan) -> Tensor:
    """Records [N, 6] of all tokens (``rows.RECORD``); fills ``gradients`` on the way."""
    hidden, weight, shard = gradients.hidden, gradients.weight, plan.shard
    count, device, inverse_temperature = hidden.shape[0], hidden.device, 1.0 / plan.temperature
    operations = row_operations(device.type)
    size = plan.chunk_tokens or chunk_size(count, shard.valid, device)
    workspace = empty_logits(min(size, count), shard.valid, device)
    columns = shard.columns(targets)
    records = torch.empty(count, len(RECORD), dtype=torch.float32, device=device)
    dtype = gradient_dtype(hidden, weight) if gradients.wanted and shard.valid else None
    for rows in token_chunks(count, size):
        logits = logits_into(workspace[: rows.stop - rows.start], hidden[rows], weight)
        parts = None
        if shard.group is not None:
            own = no_columns(len(logits), 1, device)
            if shard.valid:
                own = operations.partial_statistics(logits, columns[rows, None], inverse_temperature)
            parts = shard.gather(own)
        records[rows], grad_logits = operations.distill(
            logits, columns[rows], parts, feedback.of(rows), inverse_temperature, dtype
        )
        if grad_logits is not None:
            gradients.add(rows, grad_logits, idle=records[rows, _FEEDBACK] == 0.0)
    return records


def _for_backward(grad: Tensor | None, source: Tensor) -> Tensor | None:
    """The finished gradient as it waits: in its input's dtype, but fp32 for fp16 until the loss scale lifts it."""
    return grad if grad is None or source.dtype == torch.float16 else grad.to(source.dtype)


@overload
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
    weight_gradient: Tensor | None = None,
    loss_gradient: Tensor | float = 1.0,
    token_metrics: Literal[False] = False,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]: ...


@overload
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
    weight_gradient: Tensor | None = None,
    loss_gradient: Tensor | float = 1.0,
    token_metrics: Literal[True],
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor, TokenMetrics]: ...


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
    weight_gradient: Tensor | None = None,
    loss_gradient: Tensor | float = 1.0,
    token_metrics: bool = False,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, TokenMetrics]:
    """The loss of the module docstring, differentiable in ``hidden`` and ``weight``, and the log-probabilities.

    hidden: [N, H] fp32, bf16 or fp16, the same on every rank of ``tp_group``; N may be 0.
    weight: [V, H], this rank's V columns of the padded vocabulary (all of them without ``tp_group``).
    targets: [N] int64 vocabulary ids. teacher_logprobs, rollout_logprobs: [N] float, nats.
    coefficients: [N] float, c_n = r_b / (|S| L_i); 0 drops a token (padding), whatever its other inputs hold, NaN
    included. Where it is not 0, an id outside the vocabulary makes loss and gradients NaN.
    importance: (mode, low, high), mode mask, clip or none, as ``objective.importance_weights``.
    advantage_floor: lower limit of A_n, nats. token_weights: v_n, [N] float; None: all 1.
    weight_gradient: [V, H] fp32; d loss / d weight times ``loss_gradient`` is added to it during this call, and
    ``weight`` gets no gradient from autograd. loss_gradient: the gradient that the returned loss will receive
    (its later factors, a loss scale for one), a number or one-element tensor; read with ``weight_gradient`` alone, and
    an error in the backward pass when it was another.
    token_metrics: also return :class:`TokenMetrics`.
    temperature, valid_vocab_size, chunk_tokens, reduce_hidden_grad: as for ``linear_logprob``.

    Returns (loss, fp32 scalar; logprob, [N] fp32, nats, without graph), the same on every rank. The gradient to weight
    sums in fp32 and comes back in its dtype. Raises ValueError for shapes or settings that do not fit, TypeError for
    dtypes.
    """
    check_head_inputs(hidden, weight, temperature, chunk_tokens)
    check_targets(targets, hidden.shape[0])
    mode, low, high = importance
    if mode not in ("mask", "clip", "none"):
        raise ValueError(f"importance mode is {mode!r}; it must be mask, clip or none")
    if mode != "none" and not (high > 0.0 and (mode == "clip" or 0.0 <= low <= high)):
        raise ValueError(f"importance limits are {low} and {high}; 0 <= low <= high and high > 0 are needed")
    rows = {"targets": targets, "teacher_logprobs": teacher_logprobs, "rollout_logprobs": rollout_logprobs}
    rows |= {"coefficients": coefficients} | ({} if token_weights is None else {"token_weights": token_weights})
    for name, value in rows.items():
        if value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; ({hidden.shape[0]},) is expected")
    if weight_gradient is not None and (weight_gradient.dtype, weight_gradient.shape) != (torch.float32, weight.shape):
        raise ValueError(
            f"weight_gradient is {weight_gradient.dtype} {tuple(weight_gradient.shape)}; it must be torch.float32 "
            f"{tuple(weight.shape)}"
        )

    strength = coefficients.detach().float()
    if token_weights is not None:
        # Tokens without a coefficient may hold any weight, NaN included.
        strength = torch.where(strength == 0.0, strength, strength * token_weights.detach().float())
    scale = torch.as_tensor(loss_gradient if weight_gradient is not None else 1.0, dtype=torch.float32)
    if scale.numel() != 1:
        raise ValueError(f"loss_gradient has shape {tuple(scale.shape)}; it must be one number")
    feedback = Feedback(
        teacher_logprobs.detach().float(),
        rollout_logprobs.detach().float(),
        strength,
        scale.detach().to(hidden.device).reshape(1),
        importance,
        advantage_floor,
    )
    # Asked here, because inside an autograd function gradients always look switched off.
    tracking = torch.is_grad_enabled()
    plan = _Plan(
        temperature,
        VocabShard.of(weight, valid_vocab_size, tp_group),
        chunk_tokens,
        wants_hidden=tracking and hidden.requires_grad,
        wants_weight=tracking and weight.requires_grad,
        weight_gradient=weight_gradient if tracking else None,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    loss, records = _DistillHead.apply(hidden, weight, targets, feedback, plan)
    logprob, *others = records.t().contiguous().unbind(0)
    return (loss, logprob, TokenMetrics(*others)) if token_metrics else (loss, logprob)
