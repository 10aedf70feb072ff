"""The row operations in torch, for the CPU and for devices without Triton: a few rows at a time, in the cache.

The importance weight is spelled out here rather than taken from ``objective.importance``: it belongs to the row
operation, and the objective stays the independent reference that tests hold this file to.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_camopd.kernels.row_operations import Feedback
from megatron_camopd.kernels.vocab_parallel import RowStatistics, merge_partials, no_columns

_GROUP_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}  # logits of the rows that are worked on together


def partial_statistics(logits: Tensor, columns: Tensor, inverse_temperature: float) -> Tensor:
    """See ``RowOperations``."""
    partials = no_columns(columns.shape[0], columns.shape[1], logits.device)
    if not logits.shape[1]:
        return partials
    targets = logits.gather(1, columns.clamp(min=0)) * inverse_temperature
    partials[:, 3:] = targets.masked_fill(columns < 0, -torch.inf)
    for rows in row_groups(logits):
        scaled = logits[rows] * inverse_temperature
        top = scaled.amax(dim=1)
        partials[rows, 0] = top
        # A row of -inf has no mass. Below, -inf * 0 would be NaN; NaN itself passes all of this.
        scaled.sub_(top.masked_fill(top == -torch.inf, 0.0)[:, None]).clamp_(min=torch.finfo(torch.float32).min)
        exponentials = scaled.exp()
        partials[rows, 1] = exponentials.sum(dim=1)
        partials[rows, 2] = scaled.mul_(exponentials).sum(dim=1)
    return partials


def distill(
    logits: Tensor,
    columns: Tensor,
    parts: Tensor | None,
    feedback: Feedback,
    inverse_temperature: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """See ``RowOperations``; the gradient is fp32."""
    if parts is None:
        parts = partial_statistics(logits, columns[:, None], inverse_temperature)[None]
    statistics = RowStatistics.of(merge_partials(parts))
    logprob = statistics.logprob[:, 0]
    gap, importance, strength = _feedback(feedback, logprob)
    loss = (-strength * logprob).masked_fill(strength == 0.0, 0.0)
    records = torch.stack([logprob, statistics.entropy, gap, importance, strength, loss], dim=1)
    if gradient_dtype is None:
        return records, None
    upstream = (-strength * feedback.gradient_scale)[:, None]
    top, log_mass = statistics.top, statistics.log_mass
    columns = columns[:, None]
    return records, softmax_gradient(logits, columns, top, log_mass, upstream, inverse_temperature, gradient_dtype)


def softmax_gradient(
    logits: Tensor,
    columns: Tensor,
    top: Tensor,
    log_mass: Tensor,
    upstream: Tensor,
    inverse_temperature: float,
    gradient_dtype: torch.dtype,
) -> Tensor:
    """See ``RowOperations``; the gradient is fp32."""
    slope = upstream * inverse_temperature
    total = -slope.sum(dim=1, keepdim=True)
    idle = (upstream == 0.0).all(dim=1, keepdim=True)
    for rows in row_groups(logits):
        block = logits[rows]
        if inverse_temperature != 1.0:
            block.mul_(inverse_temperature)
        block.sub_(top[rows, None]).sub_(log_mass[rows, None]).exp_().mul_(total[rows])
        block.masked_fill_(idle[rows], 0.0)  # rows of padding may hold NaN
    if logits.shape[1]:
        # One target at a time: a column named twice in a row would make a joint scatter depend on the order.
        for kind in range(columns.shape[1]):
            one = slice(kind, kind + 1)
            added = slope[:, one].masked_fill((columns[:, one] < 0) | idle, 0.0)
            logits.scatter_add_(1, columns[:, one].clamp(min=0), added)
    return logits


def _feedback(feedback: Feedback, logprob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gap A, importance weight w, and c w v A, [C] each: exactly 0 where c, v or w is 0, whatever the others hold.

    A token that counts must be possible: log-probability -inf, an id that nobody owns, makes its share NaN.
    """
    mode, low, high = feedback.importance
    gap = feedback.teacher_logprobs - logprob
    if feedback.advantage_floor is not None:
        gap = gap.clamp(min=feedback.advantage_floor)
    importance = torch.ones_like(logprob)
    if mode != "none":
        # Comparisons with NaN are false: a NaN ratio stays and shows up in the loss.
        ratio = torch.exp(logprob - feedback.rollout_logprobs)
        outside = (ratio < low) | (ratio > high)
        importance = ratio.clamp(max=high) if mode == "clip" else ratio.masked_fill(outside, 0.0)
    factor = torch.where(feedback.coefficients == 0.0, 0.0, feedback.coefficients * importance)
    strength = torch.where(factor == 0.0, 0.0, factor * gap)
    impossible = (logprob == -torch.inf) & (feedback.coefficients != 0.0)
    return gap, importance, strength.masked_fill(impossible, torch.nan)


def row_groups(logits: Tensor) -> Iterator[slice]:
    """Slices over the rows of ``logits`` [C, V], of about _GROUP_BYTES each."""
    size = max(1, _GROUP_BYTES.get(logits.device.type, 2**28) // (4 * max(logits.shape[1], 1)))
    for start in range(0, logits.shape[0], size):
        yield slice(start, start + size)
