"""Checks of a command line that concern several settings or Megatron's own flags.

They cover which settings have an effect, the processes and their layout, the division of a batch, Megatron's
learning-rate schedules, and the paths that a run writes to. Each check raises ConfigurationError with one line. The
parameter ``given`` maps the name of each argument on the command line to the flag as written there, so that a given
flag can be told from a default.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence

from megatron_camopd.config.settings import Settings, flag_of
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime.layout import LayoutSizes


def check_relevance(
    choice: str, options: Mapping[str, Sequence[type[Settings]]], args: Namespace, given: Mapping[str, str]
) -> None:
    """Check that no flag is given that only other values of the argument ``choice`` read.

    Args:
        choice: Name of the argument that chooses, such as "stage".
        options: For each value of that argument, the settings that it reads. Flags of other settings are not checked.
        args: The parsed arguments.
        given: The given flags by argument name.
    """
    value = getattr(args, choice)
    others = {name for classes in options.values() for cls in classes for name in cls.argument_names()}
    others -= {name for cls in options[value] for name in cls.argument_names()}
    for name, flag in given.items():
        if name in others:
            raise ConfigurationError(f"{flag}: has no effect with {flag_of(choice)} {value}; drop one of the two")


def refuse_given(names: Sequence[str], given: Mapping[str, str], reason: str) -> None:
    """Check that none of the arguments ``names`` is given; ``reason`` is the text of the error."""
    for name in names:
        if name in given:
            raise ConfigurationError(f"{given[name]}: {reason}")


def check_processes(args: Namespace) -> None:
    """Check that the sizes of tensor, pipeline and context parallelism divide the number of processes."""
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    names += ["context_parallel_size"] * (args.context_parallel_size != 1)
    for name in names:
        if getattr(args, name) < 1:
            raise ConfigurationError(f"{flag_of(name)} {getattr(args, name)}: must be at least 1")
    layout = LayoutSizes.of(args).model
    if args.world_size % layout:
        raise ConfigurationError(
            f"{' x '.join(f'{flag_of(name)} {getattr(args, name)}' for name in names)} = {layout} does not divide the "
            f"{args.world_size} processes; start a multiple of {layout} (torchrun --nproc-per-node)"
        )


def check_experts(args: Namespace, given: Mapping[str, str]) -> None:
    """Check that the experts can be spread over the processes, and set the default of their tensor parallelism.

    Megatron would cut each expert by ``--tensor-model-parallel-size``; whole experts are what is usually wanted once
    they are spread over processes.
    """
    experts = args.expert_model_parallel_size
    if experts < 1:
        raise ConfigurationError(f"--expert-model-parallel-size {experts}: must be at least 1")
    if experts == 1 and "expert_tensor_parallel_size" in given:
        raise ConfigurationError(
            "--expert-tensor-parallel-size: experts are cut like the other layers unless --expert-model-parallel-size "
            "spreads them; drop the flag"
        )
    if experts > 1 and args.fp16:
        raise ConfigurationError(
            f"--expert-model-parallel-size {experts}: Megatron scales the losses of experts and other layers apart, "
            "which --fp16 does not survive; give --bf16"
        )
    if experts > 1 and "expert_tensor_parallel_size" not in given:
        args.expert_tensor_parallel_size = 1
    if experts == 1:
        return
    tensor = args.expert_tensor_parallel_size
    if tensor < 1:
        raise ConfigurationError(f"--expert-tensor-parallel-size {tensor}: must be at least 1")
    layout = experts * tensor * args.pipeline_model_parallel_size
    if args.world_size % layout:
        raise ConfigurationError(
            f"--expert-model-parallel-size {experts} x --expert-tensor-parallel-size {tensor} x "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} = {layout} does not divide the "
            f"{args.world_size} processes; start a multiple of {layout} (torchrun --nproc-per-node)"
        )


def refuse_expert_parallelism(args: Namespace) -> None:
    """Check that a stage that samples runs without expert parallelism."""
    if args.expert_model_parallel_size > 1:
        raise ConfigurationError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: --stage {args.stage} samples responses, "
            "which no rollout engine can do with it yet; it works with --stage sft"
        )


def require_given(args: Namespace, names: Sequence[str]) -> None:
    """Check that each of the arguments ``names`` has a value."""
    for name in names:
        if not getattr(args, name):
            raise ConfigurationError(f"{flag_of(name)}: missing; it has no default")


def check_output_file(flag: str, path: str) -> None:
    """Check that ``path`` is not a folder and that files can be written to its parent folder."""
    if os.path.isdir(path):
        raise ConfigurationError(f"{flag} {path}: is a folder; name a file")
    check_writable(flag, os.path.dirname(os.path.abspath(path)))


def check_positive(args: Namespace, names: Sequence[str]) -> None:
    """Check that each of the arguments ``names`` has a value of at least 1."""
    for name in names:
        value = getattr(args, name)
        if value is None:
            raise ConfigurationError(f"{flag_of(name)}: missing; it has no default")
        if value < 1:
            raise ConfigurationError(f"{flag_of(name)} {value}: must be at least 1")


def check_response_lengths(args: Namespace) -> None:
    """Check that prompt and response fit into ``--seq-length``, and set it if it was not given."""
    check_positive(args, ("max_prompt_length", "max_response_length"))
    longest = args.max_prompt_length + args.max_response_length
    if args.seq_length is None:
        args.seq_length = longest
    if longest > args.seq_length:
        raise ConfigurationError(
            f"--seq-length {args.seq_length}: too short for --max-prompt-length {args.max_prompt_length} + "
            f"--max-response-length {args.max_response_length} = {longest}"
        )


def check_shared_batch(args: Namespace) -> None:
    """Check that every data-parallel rank gets the same number of whole micro-batches."""
    data_parallel = LayoutSizes.of(args).data
    share = data_parallel * args.micro_batch_size
    if args.global_batch_size % share:
        raise ConfigurationError(
            f"--global-batch-size {args.global_batch_size}: must be a multiple of {share} "
            f"(data-parallel size {data_parallel} x --micro-batch-size {args.micro_batch_size})"
        )


def check_schedules(args: Namespace) -> None:
    """Check the arguments of Megatron's learning-rate and weight-decay schedules, which Megatron only asserts."""
    for name in ("min_lr", "lr_warmup_init"):
        if not 0 <= getattr(args, name) <= args.lr:
            raise ConfigurationError(f"{flag_of(name)} {getattr(args, name)}: must be from 0 to --lr {args.lr}")
    _check_warmup(args)
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        raise ConfigurationError(f"--lr-warmup-fraction {args.lr_warmup_fraction}: must be at least 0 and below 1")
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        raise ConfigurationError("--lr-wsd-decay-iters: missing; --lr-decay-style WSD needs it")
    if args.weight_decay < 0:
        raise ConfigurationError(f"--weight-decay {args.weight_decay}: must be at least 0")
    start, end = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style != "constant" and (start is None or end is None or not 0 <= start <= end):
        raise ConfigurationError(
            f"--start-weight-decay {start} and --end-weight-decay {end}: --weight-decay-incr-style "
            f"{args.weight_decay_incr_style} needs 0 <= start <= end"
        )


def _check_warmup(args: Namespace) -> None:
    """Check that the warm-up ends within the schedule: --lr-decay-iters if given, which may reach beyond the run."""
    constant = args.lr_decay_style == "constant" and args.lr_decay_iters is None
    length = "train_iters" if args.lr_decay_iters is None else "lr_decay_iters"
    most = getattr(args, length)
    if not 0 <= args.lr_warmup_iters <= most - (not constant):  # a decay needs a step of its own
        raise ConfigurationError(
            f"--lr-warmup-iters {args.lr_warmup_iters}: must be from 0 {'to' if constant else 'to below'} "
            f"{flag_of(length)} {most}"
        )


def check_writable(flag: str, directory: str) -> None:
    """Check that files can be created in ``directory`` or in its nearest existing parent; leaves no file behind."""
    path = os.path.abspath(directory)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    try:
        # Permission bits do not tell: root can write to a read-only folder, and no user to a read-only file system.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(f"{flag} {directory}: {path} is not a writable folder ({reason})") from error
