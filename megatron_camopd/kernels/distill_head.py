"""The output head and the distillation loss in one pass over the tokens.

    loss = - sum_n c_n w_n v_n A_n logprob_n,    logprob_n = log softmax(W x_n / T)[y_n]
    A_n = max(teacher_n - logprob_n, floor),     w_n = importance weight of exp(logprob_n - rollout_n)

A, w, v and c carry no gradient, so d loss / d logprob_n = - c_n w_n v_n A_n is known as soon as a token's
log-probability is. The product c_n w_n v_n A_n is called the token's feedback.

Design choice: the forward pass therefore also computes the gradients of hidden and weight, chunk by chunk, and the
backward pass only returns them. That takes 3 matrix products, keeps the logits of one chunk at a time, and computes
nothing twice. The coefficients c_n must be final beforehand, and their factor 1 / (|S| L_i) depends on the whole global
batch (``objective.weights``). If the caller also knows the gradient that the loss will receive, the weight's gradient
is added to the caller's fp32 buffer at once (``weight_gradient``, Megatron's ``main_grad``). Otherwise a buffer of the
weight's shape is kept until the backward pass.

Letters, partials and vocabulary shards are explained in ``kernels.vocab_parallel``, the operations on rows of logits
in ``kernels.row_operations``.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels.head_gradients import HeadGradients
from megatron_camopd.kernels.products import empty_logits, gradient_dtype, logits_into
from megatron_camopd.kernels.row_operations import RECORD, LossInputs
from megatron_camopd.kernels.rows import row_operations
from megatron_camopd.kernels.rows_torch import IMPORTANCE_MODES
from megatron_camopd.kernels.vocab_parallel import (
    VocabShard,
    check_head_inputs,
    check_targets,
    chunk_size,
    no_columns,
    token_chunks,
)

DEFAULT_IMPORTANCE = ("mask", 0.5, 5.0)
"""Mode, lower and upper bound of the importance weights; a test holds them equal to the flags' defaults."""

_FEEDBACK, _LOSS = RECORD.index("feedback"), RECORD.index("loss")


class TokenMetrics(NamedTuple):
    """Values that were computed on the way to the loss, [N] fp32 each; meaningless where the coefficient is 0.

    Attributes:
        entropy: entropy of the student's distribution, nats.
        gap: A, nats.
        importance: importance weight w.
        feedback: c w v A.
        loss: contribution of the token to the loss.
    """

    entropy: Tensor
    gap: Tensor
    importance: Tensor
    feedback: Tensor
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Options of one call to ``distill_head``.

    Attributes:
        weight_gradient: the caller's buffer that the weight's gradient is added to. With None, and if ``wants_weight``,
            autograd gets the gradient.
    """

    temperature: float
    shard: VocabShard
    chunk_tokens: int | None
    wants_hidden: bool
    wants_weight: bool
    weight_gradient: Tensor | None
    reduce_hidden_grad: bool


class _DistillHead(torch.autograd.Function):
    """Autograd function whose forward pass computes the gradients and whose backward pass returns them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, inputs: LossInputs, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        grad_weight = plan.weight_gradient
        if plan.wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        gradients = HeadGradients.allocate(hidden, weight, plan.shard, plan.wants_hidden, grad_weight)
        records = _run(gradients, targets, inputs, plan)
        grad_hidden = gradients.finished_hidden(plan.reduce_hidden_grad)
        kept_weight = None if plan.weight_gradient is not None else grad_weight
        ctx.save_for_backward(
            _to_kept_dtype(grad_hidden, hidden), _to_kept_dtype(kept_weight, weight), inputs.gradient_scale
        )
        ctx.scaled_already = plan.weight_gradient is not None
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
        if ctx.scaled_already:  # checked on the device: reading the value here would synchronise with it
            torch._assert_async((grad_loss == expected).all(), "the loss received another gradient than loss_gradient")
        else:
            grad_hidden, grad_weight = (None if x is None else x * grad_loss for x in (grad_hidden, grad_weight))
        finished = [None if x is None else x.to(t) for x, t in zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)]
        return finished[0], finished[1], None, None, None


def _run(gradients: HeadGradients, targets: Tensor, inputs: LossInputs, plan: _Plan) -> Tensor:
    """Return the records [N, 6] fp32 of all tokens (``row_operations.RECORD``) and accumulate into ``gradients``."""
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
        partials = None
        if shard.group is not None:
            own = no_columns(len(logits), 1, device)
            if shard.valid:
                own = operations.partial_statistics(logits, columns[rows, None], inverse_temperature)
            partials = shard.gather(own)
        records[rows], grad_logits = operations.distill(
            logits, columns[rows], partials, inputs.select(rows), inverse_temperature, dtype
        )
        if grad_logits is not None:
            gradients.add(rows, grad_logits, idle=records[rows, _FEEDBACK] == 0.0)
    return records


def _to_kept_dtype(grad: Tensor | None, source: Tensor) -> Tensor | None:
    """Convert ``grad`` to the dtype in which it is kept until the backward pass: that of the input ``source``.

    Gradients of fp16 inputs stay fp32, because they may underflow in fp16 until they are multiplied by the loss scale.
    """
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
    importance: tuple[str, float, float] = DEFAULT_IMPORTANCE,
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
    importance: tuple[str, float, float] = DEFAULT_IMPORTANCE,
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
    importance: tuple[str, float, float] = DEFAULT_IMPORTANCE,
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
    """Compute the distillation loss of the module docstring and the log-probabilities of the targets.

    The loss is differentiable in ``hidden`` and ``weight``. Gradients are summed in fp32 and returned in the dtype of
    their input.

    Args:
        hidden: [N, H] fp32, bf16 or fp16, the same on every rank of ``tp_group``; N may be 0.
        weight: [V, H] fp32, bf16 or fp16, this rank's V columns of the padded vocabulary (all of them without
            ``tp_group``).
        targets: [N] int64 vocabulary ids. An id outside the vocabulary makes loss and gradients NaN, unless its
            coefficient is 0.
        teacher_logprobs: [N] float, nats.
        rollout_logprobs: [N] float, nats.
        coefficients: [N] float, c_n = r_b / (|S| L_i). A token with coefficient 0 (padding) is left out, even if its
            other inputs are NaN.
        importance: (mode, low, high), where mode is mask, clip or none, as in ``objective.importance_weights``.
        advantage_floor: lower limit of A_n, nats; None for no limit.
        token_weights: [N] float, v_n; None for all 1.
        temperature: as in ``linear_logprob``.
        valid_vocab_size: as in ``linear_logprob``.
        tp_group: the tensor-parallel group that shards the vocabulary, or None.
        weight_gradient: [V, H] fp32 buffer. If given, d loss / d weight times ``loss_gradient`` is added to it during
            this call, and ``weight`` gets no gradient from autograd.
        loss_gradient: the gradient that the returned loss will receive in the backward pass (for example a loss
            scale), a number or a one-element tensor. Only used with ``weight_gradient``; the backward pass fails if it
            receives a different value.
        token_metrics: whether to return :class:`TokenMetrics` as well.
        chunk_tokens: as in ``linear_logprob``.
        reduce_hidden_grad: as in ``linear_logprob``.

    Returns:
        (loss, fp32 scalar; logprob, [N] fp32, nats, without autograd graph), and the metrics if asked for. All are the
        same on every rank.

    Raises:
        ValueError: shapes or settings do not fit.
        TypeError: a dtype is not supported.
    """
    check_head_inputs(hidden, weight, temperature, chunk_tokens)
    check_targets(targets, hidden.shape[0])
    mode, low, high = importance
    if mode not in IMPORTANCE_MODES:
        raise ValueError(f"importance mode is {mode!r}; it must be one of {', '.join(IMPORTANCE_MODES)}")
    if mode != "none" and not (high > 0.0 and 0.0 <= low <= high):
        raise ValueError(f"importance limits are {low} and {high}; 0 <= low <= high and high > 0 are needed")
    per_token = {"targets": targets, "teacher_logprobs": teacher_logprobs, "rollout_logprobs": rollout_logprobs}
    per_token |= {"coefficients": coefficients} | ({} if token_weights is None else {"token_weights": token_weights})
    for name, value in per_token.items():
        if value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; ({hidden.shape[0]},) is expected")
    if weight_gradient is not None and (weight_gradient.dtype, weight_gradient.shape) != (torch.float32, weight.shape):
        raise ValueError(
            f"weight_gradient is {weight_gradient.dtype} {tuple(weight_gradient.shape)}; it must be torch.float32 "
            f"{tuple(weight.shape)}"
        )

    weighted = coefficients.detach().float()
    if token_weights is not None:
        # Where the coefficient is 0, the token weight may be anything, even NaN.
        weighted = torch.where(weighted == 0.0, weighted, weighted * token_weights.detach().float())
    scale = torch.as_tensor(loss_gradient if weight_gradient is not None else 1.0, dtype=torch.float32)
    if scale.numel() != 1:
        raise ValueError(f"loss_gradient has shape {tuple(scale.shape)}; it must be one number")
    inputs = LossInputs(
        teacher_logprobs.detach().float(),
        rollout_logprobs.detach().float(),
        weighted,
        scale.detach().to(hidden.device).reshape(1),
        importance,
        advantage_floor,
    )
    # Read here, because is_grad_enabled() is always False inside the forward pass of an autograd function.
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
    loss, records = _DistillHead.apply(hidden, weight, targets, inputs, plan)
    logprob, *others = records.t().contiguous().unbind(0)
    return (loss, logprob, TokenMetrics(*others)) if token_metrics else (loss, logprob)
