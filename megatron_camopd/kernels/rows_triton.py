"""Row operations in Triton, for CUDA: one program per row, which reads it once for sums and once for the gradient.

``distill`` is the fused kernel of gap and truncated importance-sampling loss. Without tensor parallelism, one program
does all the work on a row and reads it the second time while much of it is still in the L2 cache. With a sharded
vocabulary, ``partial_statistics`` does the first half of the work, and ``distill`` starts from the gathered partials.

The gradient overwrites the logits. In bf16 it takes half their bytes: column j of the gradient is written where column
j / 2 of the logits was. The program has read that column already; a barrier makes this true for all of its warps. Row
offsets are 64-bit integers (N x V exceeds 2^31 from 14,135 rows of 151,936 columns on). There is no autotuning, because
tuning would run the kernels repeatedly on logits that they overwrite.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton determines the types of kernel arguments itself.

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_camopd.kernels.row_operations import RECORD, LossInputs
from megatron_camopd.kernels.rows_torch import IMPORTANCE_MODES

_BLOCK = 4096  # columns at a time, 16 fp32 values per thread
_WARPS = 8
_MODES = {mode: number for number, mode in enumerate(IMPORTANCE_MODES)}  # the kernel compares the numbers


@triton.jit
def _read_row(row, width, inverse_temperature, BLOCK: tl.constexpr):
    """Return maximum m, sum of e^(z - m) and sum of (z - m) e^(z - m) of one row.

    A single pass: the sums are rescaled whenever the running maximum grows (online softmax).
    """
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row + columns, mask=columns < width, other=float("-inf")) * inverse_temperature
        new_top = tl.maximum(top, tl.max(z, axis=0))
        # As long as all values were -inf, the sums are 0 and any finite reference will do.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        shift = tl.where(top == float("-inf"), 0.0, top - reference)
        scale = tl.exp(shift)
        shifted = z - reference
        exponentials = tl.exp(shifted)
        moment = (moment + shift * mass) * scale + tl.where(exponentials == 0.0, 0.0, shifted * exponentials)
        mass = mass * scale + exponentials
        top = new_top
    return top, tl.sum(mass, axis=0), tl.sum(moment, axis=0)


@triton.jit
def _write_gradient(
    row, gradient_row, width, top, log_mass, slope, target, inverse_temperature, idle, BLOCK: tl.constexpr
):
    """Write slope (p - onehot(target)) for all columns of the row, or 0 if ``idle``, even if the logits are NaN."""
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z = tl.load(row + columns, mask=inside, other=float("-inf")) * inverse_temperature
        gradient = slope * (tl.exp((z - top) - log_mass) - tl.where(columns == target, 1.0, 0.0))
        gradient = tl.where(idle, 0.0, gradient)
        tl.debug_barrier()  # a bf16 gradient overwrites logits that another warp may not have read yet
        tl.store(gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit
def _partials_kernel(
    logits, columns, partials, row_stride, width, inverse_temperature, TARGETS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    top, mass, moment = _read_row(row, width, inverse_temperature, BLOCK)
    out = partials + token * (3 + TARGETS)
    tl.store(out, top)
    tl.store(out + 1, mass)
    tl.store(out + 2, moment)
    for kind in tl.static_range(TARGETS):
        column = tl.load(columns + token * TARGETS + kind)
        z = tl.load(row + column, mask=column >= 0, other=float("-inf"))
        tl.store(out + 3 + kind, z * inverse_temperature)


@triton.jit(do_not_specialize=["tokens"])
def _distill_kernel(
    logits, gradient, columns, partials, teacher_logprobs, rollout_logprobs, coefficients, gradient_scale, records,
    row_stride, gradient_stride, width, tokens, low, high, floor, inverse_temperature,
    PARTS: tl.constexpr, MODE: tl.constexpr, HAS_FLOOR: tl.constexpr, WRITE: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    column = tl.load(columns + token)

    # The softmax of the row: computed from its logits, or merged from the partials of its parts in rank order.
    if PARTS == 0:
        top, mass, moment = _read_row(row, width, inverse_temperature, BLOCK)
        target = tl.load(row + column, mask=column >= 0, other=float("-inf")) * inverse_temperature
    else:
        top = tl.full((), float("-inf"), tl.float32)
        target = tl.full((), float("-inf"), tl.float32)
        for part in range(PARTS):
            top = tl.maximum(top, tl.load(partials + (part * tokens + token) * 4), propagate_nan=tl.PropagateNan.ALL)
        mass = tl.zeros((), tl.float32)
        moment = tl.zeros((), tl.float32)
        for part in range(PARTS):
            entry = partials + (part * tokens + token) * 4
            part_top = tl.load(entry)
            shift = tl.where(part_top == float("-inf"), 0.0, part_top - top)  # a part without real columns adds nothing
            part_mass = tl.load(entry + 1)
            mass += part_mass * tl.exp(shift)
            moment += (tl.load(entry + 2) + shift * part_mass) * tl.exp(shift)
            target = tl.maximum(target, tl.load(entry + 3), propagate_nan=tl.PropagateNan.ALL)
    log_mass = tl.log(mass)
    logprob = (target - top) - log_mass

    # Gap, truncated importance weight, and their product with the coefficient: exactly 0 if a factor is 0, even if
    # another one is NaN.
    gap = tl.load(teacher_logprobs + token) - logprob
    if HAS_FLOOR:
        gap = tl.maximum(gap, floor, propagate_nan=tl.PropagateNan.ALL)
    importance = tl.full((), 1.0, tl.float32)
    if MODE != 0:
        importance = tl.exp(logprob - tl.load(rollout_logprobs + token))
        if MODE == 1:  # comparisons with NaN are false, so a NaN ratio makes the loss NaN
            importance = tl.where((importance < low) | (importance > high), 0.0, importance)
        else:
            importance = tl.minimum(importance, high, propagate_nan=tl.PropagateNan.ALL)
    coefficient = tl.load(coefficients + token)
    factor = tl.where(coefficient == 0.0, 0.0, coefficient * importance)
    feedback = tl.where(factor == 0.0, 0.0, factor * gap)
    impossible = (logprob == float("-inf")) & (coefficient != 0.0)
    feedback = tl.where(impossible, float("nan"), feedback)

    record = records + token * FIELDS
    tl.store(record, logprob)
    tl.store(record + 1, log_mass - moment / mass)
    tl.store(record + 2, gap)
    tl.store(record + 3, importance)
    tl.store(record + 4, feedback)
    tl.store(record + 5, tl.where(feedback == 0.0, 0.0, -feedback * logprob))
    if WRITE:
        slope = feedback * tl.load(gradient_scale) * inverse_temperature
        _write_gradient(
            row, gradient + token * gradient_stride, width, top, log_mass, slope, column, inverse_temperature,
            feedback == 0.0, BLOCK,
        )  # fmt: skip


@triton.jit
def _softmax_gradient_kernel(
    logits, gradient, columns, tops, log_masses, slopes, row_stride, gradient_stride, width, inverse_temperature,
    TARGETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    gradient_row = gradient + token * gradient_stride
    top, log_mass = tl.load(tops + token), tl.load(log_masses + token)
    total = tl.zeros((), tl.float32)
    idle = total == 0.0
    for kind in tl.static_range(TARGETS):
        slope = tl.load(slopes + token * TARGETS + kind)
        total += slope
        idle = idle & (slope == 0.0)
    for start in range(0, width, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < width
        z = tl.load(row + places, mask=inside, other=float("-inf")) * inverse_temperature
        values = -total * tl.exp((z - top) - log_mass)
        for kind in tl.static_range(TARGETS):
            target = tl.load(columns + token * TARGETS + kind)
            values += tl.where(places == target, tl.load(slopes + token * TARGETS + kind), 0.0)
        values = tl.where(idle, 0.0, values)
        tl.debug_barrier()  # as in _write_gradient
        tl.store(gradient_row + places, values.to(gradient_row.dtype.element_ty), mask=inside)


def partial_statistics(logits: Tensor, columns: Tensor, inverse_temperature: float) -> Tensor:
    """Implement ``RowOperations.partial_statistics``."""
    tokens, targets = columns.shape
    partials = torch.empty(tokens, 3 + targets, dtype=torch.float32, device=logits.device)
    _partials_kernel[(tokens,)](
        logits, columns.contiguous(), partials, logits.stride(0), logits.shape[1], inverse_temperature,
        TARGETS=targets, BLOCK=_block(logits), num_warps=_WARPS,
    )  # fmt: skip
    return partials


def distill(
    logits: Tensor,
    columns: Tensor,
    partials: Tensor | None,
    inputs: LossInputs,
    inverse_temperature: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Implement ``RowOperations.distill``; the gradient is bf16 if that is ``gradient_dtype``, else fp32."""
    tokens = columns.shape[0]
    records = torch.empty(tokens, len(RECORD), dtype=torch.float32, device=logits.device)
    gradient = None if gradient_dtype is None else _gradient_view(logits, gradient_dtype)
    mode, low, high = inputs.importance
    _distill_kernel[(tokens,)](
        logits, logits if gradient is None else gradient, columns.contiguous(),
        logits if partials is None else partials,
        inputs.teacher_logprobs.contiguous(), inputs.rollout_logprobs.contiguous(),
        inputs.coefficients.contiguous(), inputs.gradient_scale, records,
        logits.stride(0), logits.stride(0) if gradient is None else gradient.stride(0), logits.shape[1], tokens,
        float(low), float(high), 0.0 if inputs.advantage_floor is None else float(inputs.advantage_floor),
        inverse_temperature,
        PARTS=0 if partials is None else partials.shape[0], MODE=_MODES[mode],
        HAS_FLOOR=inputs.advantage_floor is not None, WRITE=gradient is not None, FIELDS=len(RECORD),
        BLOCK=_block(logits), num_warps=_WARPS,
    )  # fmt: skip
    return records, gradient


def softmax_gradient(
    logits: Tensor,
    columns: Tensor,
    top: Tensor,
    log_mass: Tensor,
    upstream: Tensor,
    inverse_temperature: float,
    gradient_dtype: torch.dtype,
) -> Tensor:
    """Implement ``RowOperations.softmax_gradient``; the gradient is bf16 if that is ``gradient_dtype``, else fp32."""
    tokens, targets = columns.shape
    gradient = _gradient_view(logits, gradient_dtype)
    _softmax_gradient_kernel[(tokens,)](
        logits, gradient, columns.contiguous(), top.contiguous(), log_mass.contiguous(),
        (upstream * inverse_temperature).contiguous(), logits.stride(0), gradient.stride(0), logits.shape[1],
        inverse_temperature, TARGETS=targets, BLOCK=_block(logits), num_warps=_WARPS,
    )  # fmt: skip
    return gradient


def _gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a [C, V] tensor in the memory of ``logits``.

    It is bf16, in the first half of each row, if ``dtype`` is bf16, else ``logits`` itself (fp32).
    """
    return logits.view(torch.bfloat16)[:, : logits.shape[1]] if dtype == torch.bfloat16 else logits


def _block(logits: Tensor) -> int:
    """Return the number of columns to process at a time: a power of two, smaller for short rows."""
    return int(min(_BLOCK, triton.next_power_of_2(max(logits.shape[1], 16))))
