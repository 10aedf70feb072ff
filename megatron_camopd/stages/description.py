"""The resolved plan of a run in a few lines, for ``--dry-run``: layout, batch, data, and what memory follows from them.

Computed from the arguments and the plan alone: no process group, no GPU, no weights. Memory is that of parameters,
gradients and optimizer on the fullest process; activations, KV cache and buffers of libraries come on top.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any

from megatron_camopd.checkpoint.assets import read_model, run_assets
from megatron_camopd.runtime.layout import LayoutSizes
from megatron_camopd.stages.distill.plan import RunPlan
from megatron_camopd.stages.generate.plan import ResponsePlan
from megatron_camopd.stages.sft.plan import SftPlan

GIB = 2**30


def describe(args: Namespace, plan: Any) -> str:
    """Lines of text about validated ``args`` and the stage's ``plan``."""
    lines = [f"stage: {args.stage}", _layout(args), _model(args), _memory(args, plan)]
    return "\n".join([*lines, *_STAGES[args.stage](args, plan), "dry run: nothing was started or written"])


def parameters(args: Namespace) -> dict[str, int]:
    """Count the parameters of a layer, of an embedding (padded) and of the final norm of the run's model."""
    family, arch = read_model(run_assets(args))
    return {
        "layer": family.table.layer_parameters(arch),
        "embedding": args.padded_vocab_size * arch.hidden_size,
        "norm": arch.hidden_size,
    }


def _largest_shard(args: Namespace) -> int:
    """Parameters on the fullest process; norms, which tensor parallelism repeats, are counted as if cut."""
    sizes, stages = parameters(args), args.pipeline_model_parallel_size
    layers = args.num_layers // stages * sizes["layer"]
    ends = sizes["embedding"] + sizes["norm"]
    if stages == 1 and args.untie_embeddings_and_output_weights:
        ends += sizes["embedding"]
    return (layers + ends) // args.tensor_model_parallel_size


def _layout(args: Namespace) -> str:
    sizes = LayoutSizes.of(args)
    extra = ", sequence parallel" if args.sequence_parallel else ""
    return f"processes: {sizes.world} = tensor {sizes.tensor} x pipeline {sizes.pipeline} x data {sizes.data}{extra}"


def _model(args: Namespace) -> str:
    sizes = parameters(args)
    embeddings = 2 if args.untie_embeddings_and_output_weights else 1
    total = args.num_layers * sizes["layer"] + embeddings * sizes["embedding"] + sizes["norm"]
    return (
        f"model: {total / 1e9:.2f} B parameters, {args.num_layers} layers, hidden {args.hidden_size}, vocabulary "
        f"{args.vocab_size:,} (padded {args.padded_vocab_size:,}), {str(args.params_dtype).removeprefix('torch.')}"
    )


def _memory(args: Namespace, plan: Any) -> str:
    shard, mixed = _largest_shard(args), args.bf16 or args.fp16
    weights = shard * (2 if mixed else 4)
    if args.stage == "generate":
        return f"memory of a process: weights {weights / GIB:.2f} GiB"
    gradients = shard * (2 if args.grad_reduce_in_bf16 else 4)
    moments = {"adam": 8, "sgd": 4}.get(args.optimizer, 8)
    state = shard * (moments + (4 if mixed else 0))
    if args.use_distributed_optimizer:
        state //= LayoutSizes.of(args).data
    parts = {"weights": weights, "gradients": gradients, "optimizer": state}
    teachers = ""
    if isinstance(plan, RunPlan):
        parts["resident teacher"] = weights
        teachers = f"; {len(plan.teachers)} teachers in host memory, {len(plan.teachers) * weights / GIB:.2f} GiB"
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"memory of a process: {sum(parts.values()) / GIB:.2f} GiB ({listed}){teachers}"


def _microbatches(args: Namespace) -> tuple[int, int]:
    """(samples of a data-parallel rank, microbatches of them)."""
    share = args.global_batch_size // LayoutSizes.of(args).data
    return share, -(-share // args.micro_batch_size)


def _steps(args: Namespace, state: dict[str, Any] | None) -> str:
    done = "" if state is None else f", resumed from the checkpoint in {args.save}"
    return (
        f"steps: {args.train_iters}{done}; learning rate {args.lr:g} ({args.lr_decay_style}, warm-up "
        f"{args.lr_warmup_iters}), a checkpoint every {args.save_interval} steps in {args.save}"
    )


def _distill(args: Namespace, plan: RunPlan) -> list[str]:
    share, microbatches = _microbatches(args)
    longest = args.max_prompt_length + args.max_response_length
    prompts: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for step in range(args.train_iters):
        composition = plan.schedule.composition(step, args.global_batch_size)
        steps["+".join(branch.value for branch in composition)] += 1
        prompts.update({branch.value: count for branch, count in composition.items()})
    return [
        f"method: {args.distill_method}; {', '.join(f'{count} {kind}' for kind, count in steps.items())} steps",
        _steps(args, plan.state),
        f"batch: {args.global_batch_size} prompts a step, {share} on a data-parallel rank; at most {microbatches} "
        f"microbatches of {args.micro_batch_size} (what is selected is trained)",
        f"tokens: prompts up to {args.max_prompt_length:,}, responses up to {args.max_response_length:,}: at most "
        f"{args.global_batch_size * longest:,} a step",
        f"rollouts: {args.rollout_engine}, temperature {args.rollout_temperature:g}",
        *(
            f"{branch.value} prompts: {len(stream):,} rows, {prompts[branch.value]:,} drawn, "
            f"{prompts[branch.value] / len(stream):.2f} epochs"
            for branch, stream in plan.streams.items()
        ),
    ]


def _sft(args: Namespace, plan: SftPlan) -> list[str]:
    share, microbatches = _microbatches(args)
    every = f", every {args.eval_interval} steps"
    validation = "validation: none" if plan.validation is None else plan.validation.summary("validation") + every
    return [
        _steps(args, plan.state),
        f"batch: {args.global_batch_size} rows of {args.seq_length:,} tokens, {share} on a data-parallel rank in "
        f"{microbatches} microbatches of {args.micro_batch_size}: at most "
        f"{args.global_batch_size * args.seq_length:,} tokens a step",
        f"conversations: {len(plan.stream):,}",
        validation,
    ]


def _generate(args: Namespace, plan: ResponsePlan) -> list[str]:
    count = len(plan.prompts.prompts)
    return [
        f"prompts: {count:,} in {-(-count // args.global_batch_size)} rounds of {args.global_batch_size}",
        f"responses: up to {args.max_response_length:,} tokens, {args.rollout_engine}, temperature "
        f"{args.rollout_temperature:g}, to {plan.output}" + (" (complete already)" if plan.complete else ""),
    ]


_STAGES: dict[str, Callable[[Namespace, Any], list[str]]] = {"distill": _distill, "sft": _sft, "generate": _generate}
