"""Row operations in torch, for the CPU and for machines without Triton.

They work on a few rows at a time, so that intermediate results stay in the cache. The importance weight is written
out here rather than imported from ``objective.importance``, so that the objective is an independent reference for the
tests of this file.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_camopd.kernels.row_operations import LossInputs
from megatron_camopd.kernels.vocab_parallel import RowStatistics, merge_partials, no_columns

IMPORTANCE_MODES = ("none", "mask", "clip")
"""Names of the importance corrections that both back ends know."""

_GROUP_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}  # logits of one group of rows, see row_groups


def partial_statistics(logits: Tensor, columns: Tensor, inverse_temperature: float) -> Tensor:
    """Implement ``RowOperations.partial_statistics``."""
    partials = no_columns(columns.shape[0], columns.shape[1], logits.device)
    if not logits.shape[1]:
        return partials
    targets = logits.gather(1, columns.clamp(min=0)) * inverse_temperature
    partials[:, 3:] = targets.masked_fill(columns < 0, -torch.inf)
    for rows in row_groups(logits):
        scaled = logits[rows] * inverse_temperature
        top = scaled.amax(dim=1)
        partials[rows, 0] = top
        # A row of -inf alone must get mass and moment 0, but -inf - (-inf) and -inf * 0 are NaN. Hence 0 stands in for
        # its maximum, and the clamp makes -inf finite. NaN logits pass through unchanged.
        scaled.sub_(top.masked_fill(top == -torch.inf, 0.0)[:, None]).clamp_(min=torch.finfo(torch.float32).min)
        exponentials = scaled.exp()
        partials[rows, 1] = exponentials.sum(dim=1)
        partials[rows, 2] = scaled.mul_(exponentials).sum(dim=1)
    return partials


def distill(
    logits: Tensor,
    columns: Tensor,
    partials: Tensor | None,
    inputs: LossInputs,
    inverse_temperature: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Implement ``RowOperations.distill``; the gradient is always fp32."""
    if partials is None:
        partials = partial_statistics(logits, columns[:, None], inverse_temperature)[None]
    statistics = RowStatistics.of(merge_partials(partials))
    logprob = statistics.logprob[:, 0]
    gap, importance, feedback = _feedback(inputs, logprob)
    loss = (-feedback * logprob).masked_fill(feedback == 0.0, 0.0)
    records = torch.stack([logprob, statistics.entropy, gap, importance, feedback, loss], dim=1)
    if gradient_dtype is None:
        return records, None
    upstream = (-feedback * inputs.gradient_scale)[:, None]
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
    """Implement ``RowOperations.softmax_gradient``; the gradient is always fp32."""
    slope = upstream * inverse_temperature
    total = -slope.sum(dim=1, keepdim=True)
    idle = (upstream == 0.0).all(dim=1, keepdim=True)
    for rows in row_groups(logits):
        block = logits[rows]
        if inverse_temperature != 1.0:
            block.mul_(inverse_temperature)
        block.sub_(top[rows, None]).sub_(log_mass[rows, None]).exp_().mul_(total[rows])
        block.masked_fill_(idle[rows], 0.0)  # logits of padding tokens may be NaN
    if logits.shape[1]:
        # One target at a time: if two targets of a row are the same column, the order of additions in one scatter is
        # not defined.
        for k in range(columns.shape[1]):
            one = slice(k, k + 1)
            added = slope[:, one].masked_fill((columns[:, one] < 0) | idle, 0.0)
            logits.scatter_add_(1, columns[:, one].clamp(min=0), added)
    return logits


def _feedback(inputs: LossInputs, logprob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gap A, importance weight w and feedback c w v A, [C] each.

    The feedback is exactly 0 if c, v or w is 0, even if another factor is NaN. It is NaN for a token with nonzero
    coefficient and log-probability -inf, whose id is outside the vocabulary.
    """
    mode, low, high = inputs.importance
    gap = inputs.teacher_logprobs - logprob
    if inputs.advantage_floor is not None:
        gap = gap.clamp(min=inputs.advantage_floor)
    importance = torch.ones_like(logprob)
    if mode != "none":
        # Comparisons with NaN are false, so a NaN ratio is kept and makes the loss NaN.
        ratio = torch.exp(logprob - inputs.rollout_logprobs)
        outside = (ratio < low) | (ratio > high)
        importance = ratio.clamp(max=high) if mode == "clip" else ratio.masked_fill(outside, 0.0)
    factor = torch.where(inputs.coefficients == 0.0, 0.0, inputs.coefficients * importance)
    feedback = torch.where(factor == 0.0, 0.0, factor * gap)
    impossible = (logprob == -torch.inf) & (inputs.coefficients != 0.0)
    return gap, importance, feedback.masked_fill(impossible, torch.nan)


def row_groups(logits: Tensor) -> Iterator[slice]:
    """Yield slices over the rows of ``logits`` [C, V] whose logits take about _GROUP_BYTES each."""
    size = max(1, _GROUP_BYTES.get(logits.device.type, 2**28) // (4 * max(logits.shape[1], 1)))
    for start in range(0, logits.shape[0], size):
        yield slice(start, start + size)
