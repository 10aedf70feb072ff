"""Checks of a command line that belong to no single setting: each raises ConfigurationError with one line.

Which settings count, the processes and their layout, how a batch is shared, Megatron's learning-rate schedules, and
places to write to. ``given`` is the command line as Megatron's parser understood it, argument name -> flag as written,
so that a flag is never confused with a default.
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
    """Refuse flags that only other values of the argument ``choice`` read.

    ``options``: the settings that each of its values reads; settings of none of them are not its business.
    """
    value = getattr(args, choice)
    others = {name for classes in options.values() for cls in classes for name in cls.argument_names()}
    others -= {name for cls in options[value] for name in cls.argument_names()}
    for name, flag in given.items():
        if name in others:
            raise ConfigurationError(f"{flag}: has no effect with {flag_of(choice)} {value}; drop one of the two")


def refuse_given(names: Sequence[str], given: Mapping[str, str], reason: str) -> None:
    """Refuse those arguments of ``names`` that were given, for ``reason``."""
    for name in names:
        if name in given:
            raise ConfigurationError(f"{given[name]}: {reason}")


def check_processes(args: Namespace) -> None:
    """Tensor and pipeline parallelism divide the processes."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(args, name) < 1:
            raise ConfigurationError(f"{flag_of(name)} {getattr(args, name)}: must be at least 1")
    layout = LayoutSizes.of(args).model
    if args.world_size % layout:
        raise ConfigurationError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} = {layout} does not divide the {args.world_size} processes; "
            f"start a multiple of {layout} (torchrun --nproc-per-node)"
        )


def check_megatron_numbers(args: Namespace) -> None:
    """Check the numbers of Megatron's flags that Megatron itself would take as they are."""
    for name in ("seed", "save_interval"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigurationError(f"{flag_of(name)} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.lr < float("inf"):
        raise ConfigurationError(f"--lr {args.lr}: must be a number, 0 or more")


def require_given(args: Namespace, names: Sequence[str]) -> None:
    """Every argument of ``names`` has a value."""
    for name in names:
        if not getattr(args, name):
            raise ConfigurationError(f"{flag_of(name)}: missing; it has no default")


def check_output_file(flag: str, path: str) -> None:
    """``path`` is no folder, and its folder can be written."""
    if os.path.isdir(path):
        raise ConfigurationError(f"{flag} {path}: is a folder; name a file")
    check_writable(flag, os.path.dirname(os.path.abspath(path)))


def check_positive(args: Namespace, names: Sequence[str]) -> None:
    """The numbers of ``names`` are given and at least 1."""
    for name in names:
        value = getattr(args, name)
        if value is None:
            raise ConfigurationError(f"{flag_of(name)}: missing; it has no default")
        if value < 1:
            raise ConfigurationError(f"{flag_of(name)} {value}: must be at least 1")


def check_response_lengths(args: Namespace) -> None:
    """Prompt and response fit ``--seq-length``, which is set here if it was not given."""
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
    """Every data-parallel rank gets the same number of whole microbatches."""
    data_parallel = LayoutSizes.of(args).data
    share = data_parallel * args.micro_batch_size
    if args.global_batch_size % share:
        raise ConfigurationError(
            f"--global-batch-size {args.global_batch_size}: must be a multiple of {share} "
            f"(data-parallel size {data_parallel} x --micro-batch-size {args.micro_batch_size})"
        )


def check_schedules(args: Namespace) -> None:
    """What Megatron's schedules of learning rate and weight decay insist on."""
    for name in ("min_lr", "lr_warmup_init"):
        if not 0 <= getattr(args, name) <= args.lr:
            raise ConfigurationError(f"{flag_of(name)} {getattr(args, name)}: must be from 0 to --lr {args.lr}")
    length = "train_iters" if args.lr_decay_iters is None else "lr_decay_iters"
    if not 0 <= args.lr_warmup_iters < getattr(args, length):
        limit = f"{flag_of(length)} {getattr(args, length)}"
        raise ConfigurationError(f"--lr-warmup-iters {args.lr_warmup_iters}: must be from 0 to below {limit}")
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


def check_writable(flag: str, directory: str) -> None:
    """The folder, or the nearest existing one above it, must accept files; nothing stays behind."""
    path = os.path.abspath(directory)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    try:
        # Permission bits say little: root may write a read-only folder, nobody a read-only file system.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(f"{flag} {directory}: {path} is not a writable folder ({reason})") from error
