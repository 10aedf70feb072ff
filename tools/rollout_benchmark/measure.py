"""Measurement of both rollout engines on the same prompts in turns, and of the weight sync to vLLM.

Every round does the same: all weights are read from :class:`WeightSource` and dropped; the megatron engine samples;
vLLM loads the weights, as in a training step without a probe; vLLM samples; vLLM loads the weights once more, with a
probe. No token ends a response, so all responses have the full length, whatever the weights. A time is that of the
slowest rank, from a barrier until the device is idle. Peak memory is measured after the rounds, in calls of their own.
"""

import importlib.util
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_camopd.checkpoint.assets import assets_dir, read_model
from megatron_camopd.checkpoint.directory import require_checkpoint
from megatron_camopd.checkpoint.training_state import load_weights
from megatron_camopd.model.builder import build_model
from megatron_camopd.rollout import registry
from megatron_camopd.rollout.engine import RolloutEngine
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.rollout.weight_sync import WeightSource
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Layout, LayoutSizes
from megatron_camopd.runtime.startup import initialize_megatron, quiet_megatron
from tools.head_benchmark import memory

PROBE_INTERVAL = 2  # --rollout-probe-interval: weight syncs of even steps are probed
MEASURED, NOT_INSTALLED = "measured", "not installed"
ENGINES = ("megatron", "vllm")
SYNCS = ("weights alone", "sync", "sync and probe")


@dataclass
class Result:
    """Figures of one engine or one kind of weight sync: seconds of each round, and the largest peak of all ranks."""

    name: str
    status: str = MEASURED
    seconds: list[float] = field(default_factory=list)
    peak_extra_bytes: int | None = None


@dataclass
class Measurement:
    """Results of a run; sizes in bytes, lengths in tokens over all processes."""

    model_bytes: int
    prompt_tokens: int
    response_tokens: int
    engines: list[Result]
    syncs: list[Result]
    vllm_start_seconds: float | None = None
    first_sync_seconds: float | None = None


def measure(args: Namespace, *, shortest_prompt: int, repeats: int, warmup: int) -> Measurement:
    """Measure on all processes of this run. Collective.

    Args:
        args: Arguments of a training run, with vLLM as the rollout engine where :func:`has_vllm`.
        shortest_prompt: Prompt lengths are uniform from this to ``--max-prompt-length``, in tokens.
        repeats: Timed rounds.
        warmup: Rounds before the timed ones.
    """
    initialize_megatron(args)
    with quiet_megatron(args):
        model = build_model(args, trainable=False)
    load_weights(args, model, require_checkpoint("--load", args.load))
    family, arch = read_model(assets_dir(args.load))
    source = WeightSource(model, family, arch, dtype=args.params_dtype, bucket_bytes=args.weight_sync_bucket_size)
    prompts = random_prompts(args, shortest_prompt)
    native = registry.ENGINES["megatron"].build(args, model, [])
    found = Measurement(
        source.size_bytes,
        sum(map(len, prompts)),
        len(prompts) * args.max_response_length,
        [Result(name) for name in ENGINES],
        [Result(name) for name in SYNCS],
    )
    vllm = None
    if not has_vllm():
        for result in (found.engines[1], *found.syncs[1:]):
            result.status = NOT_INSTALLED
    else:
        _report_progress("starting vLLM")
        built: list[RolloutEngine] = []
        start = registry.ENGINES[RolloutSettings.of(args).rollout_engine].build
        found.vllm_start_seconds = seconds(lambda: built.append(start(args, model, [])))
        vllm = built[0]
        found.first_sync_seconds = seconds(partial(vllm.synchronize, step=0))

    def sample(engine: RolloutEngine, step: int) -> None:
        data = Layout.current().data
        indices = torch.arange(data.rank, len(prompts), data.size)
        batch = engine.generate([prompts[index] for index in indices], indices, step=step)
        assert bool((batch.response_lengths == args.max_response_length).all())

    for number in range(warmup + repeats):
        _report_progress(f"round {number + 1}/{warmup + repeats}")
        step = PROBE_INTERVAL * number + 1
        calls: list[tuple[Result, Callable[[], object]]] = [
            (found.syncs[0], partial(run_through, source)),
            (found.engines[0], partial(sample, native, step)),
        ]
        if vllm is not None:
            calls.append((found.syncs[1], partial(vllm.synchronize, step=step)))
            calls.append((found.engines[1], partial(sample, vllm, step)))
            calls.append((found.syncs[2], partial(vllm.synchronize, step=step + 1)))
        for result, call in calls:
            taken = seconds(call)
            if number >= warmup:
                result.seconds.append(taken)

    if accelerator.current().kind == "cpu":
        memory.return_freed_memory()  # after the timed rounds, because it slows allocations down
    for result, call in calls:
        if result in found.syncs:
            result.peak_extra_bytes = peak(call)
    return found


def has_vllm() -> bool:
    """Return whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def random_prompts(args: Namespace, shortest: int) -> list[list[int]]:
    """Draw ``--global-batch-size`` prompts of random token ids, the same on every rank."""
    generator = torch.Generator().manual_seed(args.seed)
    lengths = torch.randint(shortest, args.max_prompt_length + 1, (args.global_batch_size,), generator=generator)
    return [torch.randint(args.vocab_size, (length,), generator=generator).tolist() for length in lengths.tolist()]


def run_through(source: WeightSource) -> None:
    """Read all weights once and drop them."""
    for _ in source.tensors():
        pass


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds that ``call`` takes on the slowest rank. Collective."""
    _wait_for_device()
    dist.barrier()
    start = time.perf_counter()
    call()
    _wait_for_device()
    return _largest(time.perf_counter() - start)


def peak(call: Callable[[], object]) -> int | None:
    """Return the largest :func:`memory.peak_growth` of all ranks, in bytes. Collective."""
    dist.barrier()
    grown = memory.peak_growth(call, accelerator.current().device)
    largest = int(_largest(-1.0 if grown is None else float(grown)))
    return None if largest < 0 else largest


def _largest(value: float) -> float:
    """Return the largest ``value`` of all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=accelerator.current().device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def _wait_for_device() -> None:
    """Wait until the device is idle."""
    if accelerator.current().kind == "cuda":
        torch.cuda.synchronize()


def _report_progress(text: str) -> None:
    """Print a line on stderr, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def layout(args: Namespace) -> dict[str, Any]:
    """Return the parallel sizes of training and of the engines."""
    sizes, size = LayoutSizes.of(args), args.rollout_tensor_parallel_size
    return {
        "processes": sizes.world,
        "tensor_parallel": sizes.tensor,
        "pipeline_parallel": sizes.pipeline,
        "data_parallel": sizes.data,
        "rollout_tensor_parallel": size,
        "vllm_engines": sizes.world // size,
    }
