"""Both back ends of the row operations against float64, row by row from the formulas.

Triton runs on the GPU where there is one, else in its interpreter, which shows neither races nor real rounding to bf16
(it cuts off, which costs up to a whole unit in the last place instead of half).
"""

import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels.products import empty_logits
from megatron_camopd.kernels.row_operations import RECORD, LossInputs
from megatron_camopd.kernels.vocab_parallel import RowStatistics, merge_partials, no_columns
from tests.support.head_problems import BACK_ENDS, row_back_end, row_device

pytestmark = [
    pytest.mark.parametrize("back_end", BACK_ENDS),
    # The interpreter's, of NaN and infinity.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning"),
]
NAN, INF = float("nan"), float("inf")
# Rows, columns. Triton reads 4,096 columns at a time: below, exactly, and beyond two of its blocks.
SIZES = [(1, 1), (6, 13), (3, 64), (9, 333), (2, 4096), (3, 8203)]
LOGPROB_ERROR = 1e-5  # nats
BF16_STEP = 2.0**-7  # one unit in the last place, relative
MODES = [("mask", 0.5, 5.0), ("clip", 0.5, 2.0), ("none", 0.5, 5.0)]
RATIOS, GAPS = (9.0, 1.5, 0.9, 0.6, 0.15), (0.7, -0.2, -3.0, 1.1, 0.05, -0.9, 2.0)


def row_values(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Peaked rows: logits up to about +-40, some of them -inf."""
    generator = torch.Generator().manual_seed(seed)
    values = 12.0 * torch.randn(tokens, width, generator=generator)
    if width > 2:
        values[torch.rand(tokens, width, generator=generator) < 0.05] = -INF
        values[:, 1] = 3.0  # never a row without any finite logit
    return values


def as_product(values: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """``values`` as the product leaves them: fp32, rows padded; the padding holds NaN, which must never be read."""
    logits = empty_logits(values.shape[0], values.shape[1], torch.device(device))
    if logits.numel():
        padding_of(logits).fill_(NAN)
    return logits.copy_(values)


def padding_of(logits: Tensor) -> Tensor:
    """Return the elements between the rows."""
    tokens, width = logits.shape
    return logits.as_strided((tokens, logits.stride(0)), logits.stride())[:, width:]


def reference_partials(values: Tensor, columns: Tensor, inverse_temperature: float) -> Tensor:
    """m, sum e^(z - m), sum (z - m) e^(z - m) and the targets' z in float64; 0 * inf counts as 0."""
    z = values.double() * inverse_temperature
    m = z.amax(dim=1, keepdim=True)
    terms = (z - m).exp()
    moment = torch.where(terms == 0.0, 0.0, (z - m) * terms).sum(dim=1)
    targets = [[row[c].item() if c >= 0 else -INF for c in line] for row, line in zip(z, columns.tolist(), strict=True)]
    return torch.cat([m, terms.sum(dim=1, keepdim=True), moment[:, None], torch.tensor(targets).double()], dim=1)


def some_columns(values: Tensor, targets: int, seed: int = 0) -> Tensor:
    """[C, K] columns between -1 (somebody else's) and the last; the first row asks for one column K times."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(-1, values.shape[1], (len(values), targets), generator=generator)
    columns[0] = columns[0, 0]
    return columns


# ------------------------------------------------------------------------------------------------- partial statistics


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("targets", [1, 2, 3])
@pytest.mark.parametrize("inverse_temperature", [1.0, 1.0 / 0.7])
def test_partials(back_end: str, tokens: int, width: int, targets: int, inverse_temperature: float) -> None:
    operations, device = row_back_end(back_end), row_device(back_end)
    values = row_values(tokens, width)
    columns = some_columns(values, targets)
    logits = as_product(values, device)
    partials = operations.partial_statistics(logits, columns.to(device), inverse_temperature).cpu()
    expected = reference_partials(values, columns, inverse_temperature)
    assert partials.dtype == torch.float32 and partials.shape == (tokens, 3 + targets)
    torch.testing.assert_close(partials.double(), expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(logits.cpu(), values)


def small_blocks(operations: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's blocks 16 columns wide, so that short rows have many."""
    if hasattr(operations, "_BLOCK"):
        monkeypatch.setattr(operations, "_BLOCK", 16)


def test_partials_of_unusual_rows(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-inf anywhere is a column of no probability; NaN and +inf anywhere show; a row of -inf adds nothing."""
    operations, device = row_back_end(back_end), row_device(back_end)
    small_blocks(operations, monkeypatch)
    values = row_values(14, 50)
    values[0, :20] = -INF  # the whole first block and some of the next
    values[1, 16:48] = -INF
    values[2] = -INF
    values[3] = -INF
    values[3, 40] = -7.0
    values[4, ::2], values[4, 1::2] = -3e38, 3e38  # a difference beyond fp32
    for row, place in ((5, 0), (6, 20), (7, 49)):
        values[row, place] = NAN
        values[row, 30] = 60.0  # a maximum that hides NaN
    for row, place in ((8, 0), (9, 20), (10, 49)):
        values[row, place] = INF
    values[11] = NAN
    values[12] = 2.5
    values[13, 0], values[13, 49] = INF, NAN
    columns = torch.full((14, 1), 30)
    columns[3] = 40
    partials = operations.partial_statistics(as_product(values, device), columns.to(device), 1.0).cpu()
    ordinary = [0, 1, 3, 4, 12]
    expected = reference_partials(values[ordinary], columns[ordinary], 1.0)
    torch.testing.assert_close(partials[ordinary].double(), expected, rtol=2e-6, atol=1e-6)
    assert partials[2].tolist() == [-INF, 0.0, 0.0, -INF]
    broken = [5, 6, 7, 8, 9, 10, 11, 13]
    whole = RowStatistics.of(merge_partials(partials[None]))
    assert whole.logprob[broken].isnan().all() and whole.entropy[broken].isnan().all()
    assert whole.logprob[2].isnan().all() and whole.entropy[2].isnan()
    assert whole.logprob[3].item() == 0.0 and whole.entropy[3].item() == 0.0
    # As parts of longer rows: a broken part breaks the row, a part of -inf or without columns does not.
    other = reference_partials(row_values(14, 50, seed=1), columns, 1.0).float()
    joined = RowStatistics.of(merge_partials(torch.stack([partials, no_columns(14, 1, torch.device("cpu")), other])))
    assert joined.logprob[broken].isnan().all() and joined.entropy[broken].isnan().all()
    assert torch.equal(joined.entropy[2], RowStatistics.of(other).entropy[2])
    assert joined.logprob[[*ordinary, 2]].isfinite().all()


# ------------------------------------------------------------------------------------------------------------ distill


def distill_problem(values: Tensor, inverse_temperature: float, **options: Any) -> tuple[Tensor, LossInputs]:
    """Columns [C] of finite logits, and teacher and rollout log-probabilities near the student's own.

    The ratios are RATIOS in turn, inside and outside of every limit and never near one; the gaps are GAPS in turn.
    """
    columns = torch.stack([row.isfinite().nonzero()[n % 7 % int(row.isfinite().sum())] for n, row in enumerate(values)])
    logprobs = torch.log_softmax(values.double() * inverse_temperature, dim=1).gather(1, columns)[:, 0]
    tokens = torch.arange(len(values))
    ratios, gaps = torch.tensor(RATIOS)[tokens % len(RATIOS)], torch.tensor(GAPS)[tokens % len(GAPS)]
    coefficients = 0.1 + torch.rand(len(values), generator=torch.Generator().manual_seed(2))
    return columns[:, 0], LossInputs(
        (logprobs + gaps).float(), (logprobs - ratios.log()).float(), coefficients, torch.tensor([3.0]), **options
    )


def reference_distill(
    values: Tensor, columns: Tensor, inputs: LossInputs, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """Records [C, 6] and the gradient to the logits [C, V], one token after the other in float64."""
    mode, low, high = inputs.importance
    records, gradients = [], []
    for n, column in enumerate(columns.tolist()):
        z = values[n].double() * inverse_temperature
        probabilities = torch.softmax(z, dim=0)
        logprob = (z[column] - torch.logsumexp(z, dim=0)).item()
        gap = inputs.teacher_logprobs[n].item() - logprob
        if inputs.advantage_floor is not None:
            gap = max(gap, inputs.advantage_floor)
        ratio = torch.tensor(logprob - inputs.rollout_logprobs[n].item()).double().exp().item()
        weight = {"mask": ratio if low <= ratio <= high else 0.0, "clip": min(ratio, high), "none": 1.0}[mode]
        strength = inputs.coefficients[n].item() * weight * gap
        entropy = torch.special.entr(probabilities).sum().item()
        records.append([logprob, entropy, gap, weight, strength, -strength * logprob])
        probabilities[column] -= 1.0  # d(-logprob)/dz
        gradients.append(inputs.gradient_scale.item() * strength * inverse_temperature * probabilities)
    return torch.tensor(records, dtype=torch.float64), torch.stack(gradients)


def check_records(records: Tensor, expected: Tensor, inputs: LossInputs) -> None:
    """Log-probability and entropy to LOGPROB_ERROR nats; the others to what that much of an error makes of them."""
    logprob, _, gap, weight, _, _ = expected.abs().unbind(dim=1)
    one, share = torch.ones_like(gap), inputs.coefficients.cpu().double() * weight
    slopes = [one, one, one, weight, share * (gap + 1.0), share * (gap + (gap + 1.0) * logprob)]
    assert records.dtype == torch.float32
    error = (records.cpu().double() - expected).abs()
    assert (error <= LOGPROB_ERROR * torch.stack(slopes, dim=1)).all(), error.amax(dim=0)


def moved(inputs: LossInputs, device: torch.device) -> LossInputs:
    tensors = {name: value.to(device) for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    return dataclasses.replace(inputs, **tensors)


def check_gradient(gradient: Tensor, expected: Tensor, slopes: Tensor) -> None:
    """Compare to 1e-5 of ``slopes`` [C], the sizes of the rows' factors; bf16 adds a unit in the last place."""
    relative = BF16_STEP if gradient.dtype == torch.bfloat16 else 0.0
    error = (gradient.cpu().double() - expected).abs()
    assert (error <= relative * expected.abs() + 1e-5 * slopes.double()[:, None]).all(), error.max()


def slopes_of(expected: Tensor, inputs: LossInputs, inverse_temperature: float) -> Tensor:
    """How the gradient's factor of each token moves with its log-probability: scale c w (|A| + 1) / T."""
    share = inputs.coefficients.cpu().double() * expected[:, 3] * inputs.gradient_scale.item()
    return share * (expected[:, 2].abs() + 1.0) * inverse_temperature


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distill_sizes(back_end: str, tokens: int, width: int, dtype: torch.dtype) -> None:
    operations, device = row_back_end(back_end), row_device(back_end)
    values = row_values(tokens, width)
    columns, inputs = distill_problem(values, 1.0, importance=("clip", 0.5, 5.0), advantage_floor=None)
    logits = as_product(values, device)
    records, gradient = operations.distill(logits, columns.to(device), None, moved(inputs, device), 1.0, dtype)
    expected, expected_gradient = reference_distill(values, columns, inputs, 1.0)
    assert gradient.shape == (tokens, width)
    assert gradient.dtype in {torch.float32, dtype} - {torch.float16}  # fp16 needs a scale first
    check_records(records, expected, inputs)
    check_gradient(gradient, expected_gradient, slopes_of(expected, inputs, 1.0))
    assert gradient.data_ptr() == logits.data_ptr() and padding_of(logits).isnan().all()


@pytest.mark.parametrize("importance", MODES)
@pytest.mark.parametrize("floor", [None, -0.5])
@pytest.mark.parametrize("inverse_temperature", [1.0, 1.0 / 0.7])
def test_distill_modes(
    back_end: str,
    importance: tuple[str, float, float],
    floor: float | None,
    inverse_temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole rows, without gradient and with one in fp32; the same rows from three parts, one of them empty, in bf16."""
    operations, device = row_back_end(back_end), row_device(back_end)
    small_blocks(operations, monkeypatch)
    values = row_values(10, 53)
    columns, inputs = distill_problem(values, inverse_temperature, importance=importance, advantage_floor=floor)
    expected, expected_gradient = reference_distill(values, columns, inputs, inverse_temperature)
    assert importance[0] == "none" or {"mask": 0.0, "clip": importance[2]}[importance[0]] in expected[:, 3]
    assert floor is None or floor in expected[:, 2]
    slopes, inputs = slopes_of(expected, inputs, inverse_temperature), moved(inputs, device)

    def distill(logits: Tensor, low: int, parts: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Any]:
        local = local_columns(columns, low, logits).to(device)
        records, gradient = operations.distill(logits, local, parts, inputs, inverse_temperature, dtype)
        check_records(records, expected, inputs)
        return records, gradient

    whole = as_product(values, device)
    assert distill(whole, 0, None, None)[1] is None and torch.equal(whole.cpu(), values)
    check_gradient(distill(whole, 0, None, torch.float32)[1], expected_gradient, slopes)

    shards = {low: as_product(values[:, low:high], device) for low, high in ((0, 19), (19, 53))}
    parts = [
        operations.partial_statistics(
            shard, local_columns(columns, low, shard)[:, None].to(device), inverse_temperature
        )
        for low, shard in shards.items()
    ]
    stacked = torch.stack([parts[0], no_columns(10, 1, device), parts[1]])
    empty = distill(as_product(values[:, :0], device), 0, stacked, None)
    results = [distill(shard, low, stacked, torch.bfloat16) for low, shard in shards.items()]
    assert empty[1] is None and all(torch.equal(records, empty[0]) for records, _ in results)
    check_gradient(torch.cat([gradient for _, gradient in results], dim=1), expected_gradient, slopes)


def local_columns(columns: Tensor, low: int, logits: Tensor) -> Tensor:
    """``columns`` as those of a shard that starts at ``low``, -1 where it does not hold them."""
    local = columns - low
    return local.masked_fill((local < 0) | (local >= logits.shape[1]), -1)


@pytest.mark.parametrize("importance", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_coefficient(back_end: str, importance: tuple[str, float, float], dtype: torch.dtype) -> None:
    """Feedback, loss and gradient are exactly 0, whatever the row and the other log-probabilities hold."""
    operations, device = row_back_end(back_end), row_device(back_end)
    values = row_values(7, 40)
    values[0], values[1, 3], values[2] = NAN, INF, -INF
    inputs = LossInputs(
        torch.tensor([0.0, 0.0, 0.0, NAN, -INF, 0.0, INF]),
        torch.tensor([0.0, 0.0, 0.0, NAN, 0.0, -INF, NAN]),
        torch.zeros(7),
        torch.ones(1),
        importance,
        -0.5,
    )
    columns = torch.tensor([3, 3, 3, 3, -1, -1, 3])
    for parts in (False, True):
        logits = as_product(values, device)
        partials = operations.partial_statistics(logits, columns[:, None].to(device), 1.0)[None] if parts else None
        records, gradient = operations.distill(logits, columns.to(device), partials, moved(inputs, device), 1.0, dtype)
        assert records[:, RECORD.index("feedback") :].eq(0.0).all() and gradient.eq(0.0).all()


@pytest.mark.parametrize("importance", MODES)
@pytest.mark.parametrize("floor", [None, -0.5])
def test_broken_tokens_that_count_are_nan(
    back_end: str, importance: tuple[str, float, float], floor: float | None
) -> None:
    """An id that nobody owns, an id of no probability, and NaN: never hidden by the importance weight or the floor."""
    operations, device = row_back_end(back_end), row_device(back_end)
    values = row_values(7, 40)
    values[1, 3], values[2, 9], values[3, 9], values[4] = -INF, NAN, INF, -INF
    teacher, rollout = torch.full((7,), -1.0), torch.full((7,), -1.0)
    teacher[5], rollout[6] = NAN, NAN
    columns = torch.tensor([-1, 3, 3, 3, 3, 1, 1])
    # A ratio that would be dropped takes the token's NaN gap along, as the objective does: so make it 1.
    rollout[5] = torch.log_softmax(values[5].double(), dim=0)[1].float()
    inputs = moved(LossInputs(teacher, rollout, torch.ones(7), torch.ones(1), importance, floor), device)
    records, gradient = operations.distill(as_product(values, device), columns.to(device), None, inputs, 1.0, None)
    assert gradient is None
    _, gradient = operations.distill(as_product(values, device), columns.to(device), None, inputs, 1.0, torch.float32)
    broken = [0, 1, 2, 3, 4, 5] + ([6] if importance[0] != "none" else [])
    loss = records[:, RECORD.index("loss")].cpu()
    assert loss[broken].isnan().all() and gradient.cpu()[broken].isnan().all()
    assert importance[0] != "none" or (loss[6].isfinite() and gradient[6].isfinite().all())


# --------------------------------------------------------------------------------------------------- softmax gradient


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("targets", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_gradient(back_end: str, tokens: int, width: int, targets: int, dtype: torch.dtype) -> None:
    operations, device = row_back_end(back_end), row_device(back_end)
    inverse_temperature = 1.0 / 0.7
    values = row_values(tokens, width)
    columns = some_columns(values, targets)
    upstream = torch.randn(tokens, targets, generator=torch.Generator().manual_seed(4))
    upstream[0, -1] = 0.0
    z = values.double() * inverse_temperature
    top = values.amax(dim=1) * inverse_temperature
    log_mass = (torch.logsumexp(z, dim=1) - top.double()).float()
    probabilities = torch.softmax(z, dim=1)
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for n in range(tokens):
        for k, column in enumerate(columns[n].tolist()):
            hot = torch.zeros(width, dtype=torch.float64)
            hot[column] = float(column >= 0)
            expected[n] += upstream[n, k].item() * inverse_temperature * (hot - probabilities[n])
    if tokens > 1:  # an idle row
        upstream[1], values[1], top[1], expected[1] = 0.0, NAN, NAN, 0.0
    moved_in = [value.to(device) for value in (columns, top, log_mass, upstream)]
    logits = as_product(values, device)
    gradient = operations.softmax_gradient(logits, *moved_in, inverse_temperature, dtype)
    assert gradient.data_ptr() == logits.data_ptr() and padding_of(logits).isnan().all()
    check_gradient(gradient, expected, inverse_temperature * upstream.abs().sum(dim=1))
    assert tokens == 1 or gradient[1].eq(0.0).all()


# -------------------------------------------------------------------------------------------- large and repeated calls


def far_apart(values: Tensor, stride: int, device: torch.device) -> Tensor:
    """``values`` as rows ``stride`` elements apart, 2^31 elements from the start of their memory.

    An index that wraps at 2^31 then lands in that memory, and the results are wrong rather than the process dead. On
    the CPU only pages that are written exist.
    """
    tokens, width = values.shape
    try:
        memory = torch.empty(2**31 + (tokens - 1) * stride + width, dtype=torch.float32, device=device)
    except RuntimeError as error:
        pytest.skip(f"17 GB of address space are not to be had: {str(error).splitlines()[0]}")
    return memory.as_strided((tokens, width), (stride, 1), 2**31).copy_(values)


def test_rows_beyond_32_bit_indices(back_end: str) -> None:
    """Offsets pass 2^31 as fp32 in the last row, as bf16 from the third on."""
    operations, device = row_back_end(back_end), row_device(back_end)
    values, stride = row_values(5, 37), 2**29 + 64
    columns, inputs = distill_problem(values, 1.0, importance=("none", 0.5, 5.0), advantage_floor=None)
    expected, expected_gradient = reference_distill(values, columns, inputs, 1.0)
    columns, inputs = columns.to(device), moved(inputs, device)
    logits = far_apart(values, stride, device)
    assert 4 * stride > 2**31 and 2 * stride < 2**31

    partials = operations.partial_statistics(logits, columns[:, None], 1.0)
    reference = reference_partials(values, columns.cpu()[:, None], 1.0)
    torch.testing.assert_close(partials.cpu().double(), reference, rtol=2e-6, atol=1e-6)
    statistics, slopes = RowStatistics.of(partials), slopes_of(expected, inputs, 1.0)
    upstream = (-3.0 * expected[:, RECORD.index("feedback")]).float()[:, None].to(device)
    for dtype in (torch.float32, torch.bfloat16):
        for parts in (None, partials[None]):
            records, gradient = operations.distill(logits.copy_(values), columns, parts, inputs, 1.0, dtype)
            check_records(records, expected, inputs)
            check_gradient(gradient, expected_gradient, slopes)
        gradient = operations.softmax_gradient(
            logits.copy_(values), columns[:, None], statistics.top, statistics.log_mass, upstream, 1.0, dtype
        )
        check_gradient(gradient, expected_gradient, slopes)


def test_same_bits_twice(back_end: str) -> None:
    operations, device = row_back_end(back_end), row_device(back_end)
    values = row_values(5, 8203)
    columns, inputs = distill_problem(values, 1.0, importance=("clip", 0.5, 5.0), advantage_floor=-0.5)
    columns, inputs = columns.to(device), moved(inputs, device)
    runs = []
    for _ in range(2):
        partials = operations.partial_statistics(as_product(values, device), columns[:, None], 1.0)
        whole = RowStatistics.of(partials)
        records, gradient = operations.distill(as_product(values, device), columns, None, inputs, 1.0, torch.bfloat16)
        twice = columns[:, None].expand(-1, 2)
        slopes = torch.ones(5, 2, device=device)
        other = operations.softmax_gradient(
            as_product(values, device), twice, whole.top, whole.log_mass, slopes, 1.0, torch.float32
        )
        runs.append((partials, records, gradient, other))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
