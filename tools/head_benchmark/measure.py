"""Measurement of time, memory and error of the contestants for one case.

Time: the contestants take turns in rounds (A B C A B C ...), so that a machine that slows down slows all of them. A
call is timed by wall clock from an idle device to an idle device. Error: the difference of the first call to float64
(see ``problem``). Memory: see ``memory``; on a CPU it is measured in a fresh process for each contestant and mode,
which cannot reuse memory that others have freed. Over a tensor-parallel group every figure is the largest of all ranks.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from tools.head_benchmark import memory
from tools.head_benchmark.contestants import Contestant
from tools.head_benchmark.problem import Case, Problem, make_problem, reference_gradients, reference_strength
from tools.head_benchmark.processes import run_group

MODES = ("forward", "training")
SAMPLED_ROWS = 64  # rows of each gradient that are compared with float64
MEASURED = "measured"


@dataclasses.dataclass
class Result:
    """Figures of one contestant in one mode; None means not measured.

    Attributes:
        contestant: Name of the contestant.
        mode: "forward" or "training".
        status: MEASURED, or in a few words why it was not measured.
        seconds: Seconds of each timed call.
        peak_extra_bytes: Peak extra memory; in training without one fp32 buffer of the weight's shape.
        logprob_error_max: Largest absolute error of the log-probabilities, nats.
        logprob_error_mean: Mean absolute error of the log-probabilities, nats.
        hidden_gradient_error: Norm of the difference to the float64 gradient over that gradient's norm, on the sampled
            rows.
        weight_gradient_error: The same for the weight's gradient.
    """

    contestant: str
    mode: str
    status: str = MEASURED
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_extra_bytes: int | None = None
    logprob_error_max: float | None = None
    logprob_error_mean: float | None = None
    hidden_gradient_error: float | None = None
    weight_gradient_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        repeats: Timed rounds.
        threads: CPU threads per process.
        device: "cpu" or "cuda".
        warmup: Calls before the timed ones.
        memory: Whether to measure peak memory.
    """

    repeats: int
    threads: int
    device: str = "cpu"
    warmup: int = 1
    memory: bool = True


def measure_case(
    case: Case, contestants: Sequence[Contestant], modes: Sequence[str], settings: Settings
) -> list[Result]:
    """Measure every contestant in every mode; return the results in the order of modes, then contestants."""
    world = (case.tp, settings.threads, settings.device)
    results, exact_logprobs = run_group(*world, False, _measure_group, case, contestants, modes, settings)
    for result in results if settings.memory and settings.device == "cpu" else ():
        contestant = next(entry for entry in contestants if entry.name == result.contestant)
        if result.status != MEASURED or contestant.preallocates:
            continue
        try:
            args = (case, contestant, result.mode, exact_logprobs)
            result.peak_extra_bytes = run_group(*world, True, fresh_peak_memory, *args)
            report_progress(f"{result.mode} {result.contestant}: peak extra {result.peak_extra_bytes} bytes")
        except torch.multiprocessing.ProcessExitedException as error:  # the system kills it when memory runs out
            report_progress(f"{result.mode} {result.contestant}: peak extra not measured: {_first_line(error)}")
    return results


def _measure_group(
    device: torch.device,
    group: dist.ProcessGroup | None,
    case: Case,
    contestants: Sequence[Contestant],
    modes: Sequence[str],
    settings: Settings,
) -> tuple[list[Result], Tensor]:
    """Measure in one process group; return the results and the exact log-probabilities [N] float64 on the CPU."""
    problem = make_problem(case, device, group)
    results = []
    for mode in modes:
        pairs = [(contestant, Result(contestant.name, mode)) for contestant in contestants]
        for contestant, result in pairs:
            result.status = contestant.obstacle(case, device) or MEASURED
            if result.status == MEASURED:
                result.status = _first_calls(contestant, problem, result, settings)
            report_progress(f"{mode} {contestant.name}: {result.status}", group)
        for turn in range(settings.repeats):
            for contestant, result in pairs:
                if result.status == MEASURED:
                    result.status = _attempt(contestant, problem, functools.partial(_time, contestant, problem, result))
                    took = f"{result.seconds[-1] * 1e3:.1f} ms" if result.status == MEASURED else result.status
                    report_progress(f"{mode} {contestant.name}: {turn + 1}/{settings.repeats} {took}", group)
        results += [result for _, result in pairs]
    return results, problem.exact_logprobs.cpu()


def _first_calls(contestant: Contestant, problem: Problem, result: Result, settings: Settings) -> str:
    """Take the errors from the first call, run the other warm-up calls, measure memory on CUDA; return the status."""

    def check() -> None:
        with _prepared(contestant, problem, result.mode):
            output = getattr(contestant, result.mode)(problem)
            _fill_errors(result, contestant, problem, output)

    def warm_up() -> None:
        for _ in range(settings.warmup - 1):
            with _prepared(contestant, problem, result.mode):
                getattr(contestant, result.mode)(problem)

    def measure_memory() -> None:
        if settings.memory and settings.device == "cuda" and not contestant.preallocates:
            result.peak_extra_bytes = peak_memory(contestant, problem, result.mode)

    for step in (check, warm_up, measure_memory):
        status = _attempt(contestant, problem, step)
        if status != MEASURED:
            break
    return status


@contextlib.contextmanager
def _prepared(contestant: Contestant, problem: Problem, mode: str, weight_frozen: bool = False) -> Iterator[None]:
    """Clear the gradients, set ``requires_grad`` for the mode, and hold the contestant's buffers inside the context."""
    training = mode == "training"
    wants_weight = training and not weight_frozen
    problem.wants_gradients(hidden=training, weight=wants_weight)
    if not (wants_weight and contestant.accumulates):
        problem.weight_gradient = None
    else:
        if problem.weight_gradient is None:
            problem.weight_gradient = torch.empty_like(problem.weight, dtype=torch.float32, requires_grad=False)
        problem.weight_gradient.zero_()
    try:
        contestant.prepare(problem, mode)
        yield
    finally:
        contestant.release()
        problem.wants_gradients(hidden=False, weight=False)


def _time(contestant: Contestant, problem: Problem, result: Result) -> None:
    """Time one call and append its seconds to ``result``."""
    device = problem.hidden.device
    with _prepared(contestant, problem, result.mode):
        if problem.group is not None:
            dist.barrier(problem.group)
        _wait_for(device)
        start = time.perf_counter()
        getattr(contestant, result.mode)(problem)
        _wait_for(device)
        elapsed = time.perf_counter() - start
    result.seconds.append(_largest(elapsed, problem))


def _fill_errors(result: Result, contestant: Contestant, problem: Problem, output: Tensor | None) -> None:
    """Set the errors of ``result`` from the output of a call, or from the gradients that it left."""
    if result.mode == "forward":
        if output is not None:
            difference = (output.detach().double() - problem.exact_logprobs).abs()
            result.logprob_error_max = _largest(difference.max().item(), problem)
            result.logprob_error_mean = _largest(difference.mean().item(), problem)
        return
    grad_hidden = problem.hidden.grad
    grad_weight = problem.weight_gradient if contestant.accumulates else problem.weight.grad
    if contestant.preallocates or grad_hidden is None or grad_weight is None:
        return
    tokens, vocabulary = _sampled_rows(problem)
    strength = reference_strength(problem) if contestant.weighted else torch.ones_like(problem.exact_logprobs)
    exact_hidden, exact_weight = reference_gradients(problem, strength, tokens, vocabulary)
    result.hidden_gradient_error = _largest(_relative(grad_hidden[tokens], exact_hidden), problem)
    result.weight_gradient_error = _largest(_relative(grad_weight[vocabulary], exact_weight), problem)


def _sampled_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Draw tokens and rows of this rank's weight; up to half of the weight's rows are those of targets."""
    tokens, width = len(problem.hidden), len(problem.weight)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(tokens, generator=generator)[:SAMPLED_ROWS]
    local = (problem.targets - problem.first_row).cpu()
    named = local[(local >= 0) & (local < width)][: SAMPLED_ROWS // 2]
    vocabulary = torch.cat([named, torch.randint(width, (SAMPLED_ROWS // 2,), generator=generator)]).unique()
    return rows.to(problem.hidden.device), vocabulary.to(problem.hidden.device)


def _relative(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of ``exact``."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def fresh_peak_memory(
    device: torch.device,
    group: dist.ProcessGroup | None,
    case: Case,
    contestant: Contestant,
    mode: str,
    exact_logprobs: Tensor,
) -> int | None:
    """Measure a contestant's peak extra bytes; to be called in a process that has done nothing else."""
    memory.return_freed_memory()
    small = dataclasses.replace(case, tokens=min(case.tokens, 8), vocab=min(case.vocab, 1024 * case.tp))
    with _prepared(contestant, tiny := make_problem(small, device, group), mode):  # so that libraries are loaded before
        getattr(contestant, mode)(tiny)
    return peak_memory(contestant, make_problem(case, device, group, exact_logprobs), mode)


def peak_memory(contestant: Contestant, problem: Problem, mode: str) -> int | None:
    """Measure the peak extra bytes of one call (in training of two, see ``memory``); None where that is impossible."""
    call = functools.partial(getattr(contestant, mode), problem)
    device = problem.hidden.device
    with _prepared(contestant, problem, mode, weight_frozen=True):
        peak = memory.peak_growth(call, device)
    if mode == "training":
        with _prepared(contestant, problem, mode):
            full = memory.peak_growth(call, device)
        free = 0 if contestant.accumulates else problem.weight.numel() * 4
        peak = None if peak is None or full is None else max(peak, full - free)
    return None if peak is None else int(_largest(peak, problem))


def _attempt(contestant: Contestant, problem: Problem, step: Callable[[], None]) -> str:
    """Run ``step``; return the contestant's status.

    Running out of memory and errors of other packages become the status; an error of our own code is raised.
    """
    status = MEASURED
    try:
        step()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            status = "out of memory"
        elif contestant.module is not None:
            status = f"failed: {type(error).__name__}: {_first_line(error)}"
        else:
            raise
    if problem.hidden.is_cuda and status != MEASURED:
        torch.cuda.empty_cache()
    if _largest(float(status != MEASURED), problem) and status == MEASURED:
        status = "failed on another rank"
    return status


def _first_line(error: Exception) -> str:
    """Return the first line of the error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def _largest(value: float, problem: Problem) -> float:
    """Return the largest ``value`` of the group's ranks."""
    if problem.group is None:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=problem.hidden.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=problem.group)
    return shared.item()


def _wait_for(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report_progress(line: str, group: dist.ProcessGroup | None = None) -> None:
    """Print one line on stderr, on the first rank of ``group`` alone."""
    if group is None or dist.get_rank(group) == 0:
        print(f"  {line}", file=sys.stderr, flush=True)
