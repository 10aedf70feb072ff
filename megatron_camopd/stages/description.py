"""The lines that ``--dry-run`` prints in every stage: layout, model, memory and steps.

They are computed from the arguments and the plan, without process group, GPU or weights. The memory stated is that of
parameters, gradients and optimizer on the process that holds the most; activations, KV cache and buffers of libraries
come on top.
"""

from argparse import Namespace
from dataclasses import replace
from itertools import islice
from typing import Any

from megatron_camopd.checkpoint.assets import read_model, run_assets
from megatron_camopd.config.pipeline import layers_of_stages
from megatron_camopd.model.packing import PackingSettings
from megatron_camopd.runtime.layout import LayoutSizes

GIB = 2**30


def model_lines(args: Namespace, *, trainable: bool = True, teachers: int = 0) -> list[str]:
    """Return lines about layout, model and memory.

    Args:
        args: The validated arguments.
        trainable: Whether the run holds gradients and an optimizer.
        teachers: Number of teachers in host memory; one of them is also resident in device memory.
    """
    return [_layout(args), _model(args), _memory(args, trainable, teachers)]


def parameters(args: Namespace, *, active: bool = False) -> dict[str, int]:
    """Return the numbers of parameters of all layers, of one embedding (padded) and of the final norm.

    Args:
        args: The validated arguments.
        active: Count only the experts that a token uses.
    """
    _, arch = read_model(run_assets(args))
    return {
        "layers": sum(_layers(args, active=active)),
        "embedding": args.padded_vocab_size * arch.hidden_size,
        "norm": arch.hidden_size,
    }


def largest_shard(args: Namespace) -> int:
    """Return the number of parameters on the process that holds the most.

    Norms and routers, which tensor parallelism replicates, are counted as if they were sharded.
    """
    return sum(_shard(args))


def _shard(args: Namespace) -> tuple[int, int]:
    """Return the parameters of other layers and of experts on the process that holds the most of both together."""
    family, arch = read_model(run_assets(args))
    sizes, without = parameters(args), replace(arch, experts_per_token=0)
    tensor = args.tensor_model_parallel_size
    expert_ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tensor)
    dense = [family.table.layer_parameters(layer, without, active=True) for layer in range(arch.num_layers)]
    experts = iter(total - other for total, other in zip(_layers(args), dense, strict=True))
    others = iter(dense)
    stages = [[sum(islice(others, n)), sum(islice(experts, n))] for n in layers_of_stages(args)]
    stages[0][0] += sizes["embedding"]
    stages[-1][0] += sizes["norm"]
    if len(stages) > 1 or args.untie_embeddings_and_output_weights:
        stages[-1][0] += sizes["embedding"]  # the output matrix; if tied, the last stage's copy
    held = [(other // tensor, expert // expert_ranks) for other, expert in stages]
    return max(held, key=sum)


def _layers(args: Namespace, *, active: bool = False) -> list[int]:
    """Return the number of parameters of each layer."""
    family, arch = read_model(run_assets(args))
    return [family.table.layer_parameters(layer, arch, active=active) for layer in range(arch.num_layers)]


def _layout(args: Namespace) -> str:
    sizes = LayoutSizes.of(args)
    extra = ", sequence parallel" if args.sequence_parallel else ""
    layers = layers_of_stages(args)
    if len(set(layers)) > 1:
        extra += f", layers of the stages {' + '.join(map(str, layers))}"
    experts = f", experts {sizes.expert} x {args.expert_tensor_parallel_size}" if sizes.expert > 1 else ""
    context = f" x context {sizes.context}" if sizes.context > 1 else ""
    model = f"tensor {sizes.tensor} x pipeline {sizes.pipeline}{context}"
    return f"processes: {sizes.world} = {model} x data {sizes.data}{experts}{extra}"


def _model(args: Namespace) -> str:
    embeddings = 2 if args.untie_embeddings_and_output_weights else 1
    total, active = (
        sizes["layers"] + embeddings * sizes["embedding"] + sizes["norm"]
        for sizes in (parameters(args), parameters(args, active=True))
    )
    _, arch = read_model(run_assets(args))
    experts = f" ({active / 1e9:.2f} B active, {arch.experts_per_token} of {arch.num_experts} experts)"
    return (
        f"model: {total / 1e9:.2f} B parameters{experts if arch.num_experts else ''}, {args.num_layers} layers, hidden "
        f"{args.hidden_size}, vocabulary {args.vocab_size:,} (padded {args.padded_vocab_size:,}), "
        f"{str(args.params_dtype).removeprefix('torch.')}"
    )


def _memory(args: Namespace, trainable: bool, teachers: int) -> str:
    (other, experts), mixed = _shard(args), args.bf16 or args.fp16
    shard = other + experts
    weights = shard * (2 if mixed else 4)
    if not trainable:
        return f"memory of a process: weights {weights / GIB:.2f} GiB"
    gradients = shard * (2 if args.grad_reduce_in_bf16 else 4)
    sizes = LayoutSizes.of(args)
    moments = {"adam": 8, "sgd": 4}.get(args.optimizer, 8)
    if args.use_distributed_optimizer:  # each part is divided among the processes that hold the same of it
        other //= sizes.data * sizes.context
        tensor = args.expert_tensor_parallel_size or sizes.tensor
        experts //= max(1, sizes.world // (sizes.expert * tensor * sizes.pipeline))
    state = (other + experts) * (moments + (4 if mixed else 0))
    parts = {"weights": weights, "gradients": gradients, "optimizer": state}
    in_host_memory = ""
    if teachers:
        parts["resident teacher"] = weights
        in_host_memory = f"; {teachers} teachers in host memory, {teachers * weights / GIB:.2f} GiB"
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"memory of a process: {sum(parts.values()) / GIB:.2f} GiB ({listed}){in_host_memory}"


def microbatches(args: Namespace) -> tuple[int, str]:
    """Return a data-parallel rank's share of the global batch, and its micro-batches in words.

    Their number is that of a share in which every sequence is as long as can be.
    """
    share = args.global_batch_size // LayoutSizes.of(args).data
    tokens = PackingSettings.of(args).max_tokens_per_microbatch
    assert tokens is not None, "set by PackingSettings.check_run"
    return share, f"{-(-share // (tokens // args.seq_length))} microbatches of {tokens:,} tokens"


def steps(args: Namespace, state: dict[str, Any] | None) -> str:
    """Return a line about steps, learning rate and checkpoints; ``state``: that of the resumed checkpoint, or None."""
    done = "" if state is None else f", resumed from the checkpoint in {args.save}"
    return (
        f"steps: {args.train_iters}{done}; learning rate {args.lr:g} ({args.lr_decay_style}, warm-up "
        f"{args.lr_warmup_iters}), a checkpoint every {args.save_interval} steps in {args.save}"
    )
