"""Arguments that depend on checkpoints: folders to read and write, and the architecture, which a checkpoint states.

The architecture comes from the checkpoint (``--use-checkpoint-args``, always on): the one in ``--save`` when there is
one (the run resumes), else the one in ``--load``.
"""

import os
import traceback
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import islice

from megatron_camopd.checkpoint.assets import read_model, run_assets
from megatron_camopd.checkpoint.consistency import check_config
from megatron_camopd.checkpoint.directory import CheckpointLocation, find_checkpoint, require_checkpoint
from megatron_camopd.checkpoint.integrity import check_readable, newest_intact, say_passed_over
from megatron_camopd.checkpoint.megatron_reader import reading
from megatron_camopd.checkpoint.origin import read_begun
from megatron_camopd.checkpoint.unpickling import restricted_unpickling
from megatron_camopd.config import megatron_flags
from megatron_camopd.config.checks import check_writable
from megatron_camopd.config.command_line import parse_command_line
from megatron_camopd.config.pipeline import layers_of_stages
from megatron_camopd.config.settings import Settings, flag_of
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime.startup import quiet_megatron


def check_run_folders(args: Namespace, checkpoints: Sequence[str], records: str) -> None:
    """Check the folders of a training run, and find out whether ``--save`` holds a run to go on with.

    ``--save`` must be writable and hold a run or nothing. Sets ``args.resumed``, the newest checkpoint of the run that
    is not damaged, or None; ``args.resume``, whether there is one; and ``args.camopd_state``, the state of a run that
    has none yet, or None.

    Args:
        args: The parsed arguments.
        checkpoints: Names of the arguments that name checkpoints to read.
        records: Name of the file that a run writes to ``--save`` from its first step on.
    """
    check_writable("--save", args.save)
    if args.tensorboard_dir is not None:
        check_writable("--tensorboard-dir", args.tensorboard_dir)
    resumed, args.passed_over = newest_intact(args.save, args.passed_over)
    say_passed_over(args.save, resumed, args.passed_over)
    if resumed is not None and resumed.iteration is None:
        raise ConfigurationError(f"--save {args.save}: holds a converted model; give training a folder of its own")
    args.resumed, args.resume = resumed, resumed is not None
    args.camopd_state = None if args.resume else read_begun(args.save, records)
    check_checkpoints(args, checkpoints)


def run_folder_changed(args: Namespace) -> bool:
    """Return whether ``--save`` has another newest checkpoint than when the arguments were checked."""
    if args.save is None:
        return False
    newest = find_checkpoint(args.save, without=args.passed_over)
    return bool(newest != args.resumed)


def student_checkpoint(args: Namespace) -> dict[str, CheckpointLocation]:
    """Return the checkpoint that the student's weights come from, by the text that names its flag and folder."""
    if args.resumed is not None:
        return {f"--save {args.save}": args.resumed}
    return {f"--load {args.load}": require_checkpoint("--load", args.load)}


def check_checkpoints(args: Namespace, names: Sequence[str]) -> None:
    """Check that those arguments of ``names`` that are given name Megatron checkpoints; makes their paths absolute."""
    for name in names:
        directory = getattr(args, name)
        if directory is not None:
            location = require_checkpoint(flag_of(name), directory)
            if name == "load" and not args.resume:
                check_readable(location, "--load")
            setattr(args, name, os.path.abspath(directory))


def complete_arguments(args: Namespace, given: Mapping[str, str]) -> None:
    """Fill in the model's architecture from its checkpoint and let Megatron validate all arguments.

    ``given``: the flags on the command line, argument name -> flag as written; those about the architecture must agree
    with the checkpoint. Sets ``args.camopd_state``, the saved state of a run that resumes, and ``padded_vocab_size``.

    Raises:
        ConfigurationError: a damaged checkpoint, a flag that contradicts it, sizes that do not divide, or what
            Megatron refuses.
    """
    _take_architecture(args, given)
    _check_model_fits(args)
    with quiet_megatron(args):
        _validate(args)
    args.padded_vocab_size = padded_vocab_size(args)


def model_arguments(checkpoint: str, groups: Sequence[type[Settings]]) -> Namespace:
    """Return validated arguments of one process that only runs the model in ``checkpoint``, in float32.

    ``groups``: settings of ours that the model reads, at their defaults.
    """
    require_checkpoint("--load", checkpoint)
    args, _ = parse_command_line(["--load", checkpoint, "--global-batch-size", "1"], groups, {})
    args.resume, args.resumed, args.camopd_state = False, None, None
    _take_architecture(args, {})
    args.seq_length = args.max_position_embeddings
    with quiet_megatron(args):
        _validate(args)
    args.padded_vocab_size = padded_vocab_size(args)
    return args


def padded_vocab_size(args: Namespace) -> int:
    """Return the rows of the embedding: the vocabulary rounded up so that all tensor-parallel ranks get as many."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return int(-(-args.vocab_size // multiple) * multiple)


def _validate(args: Namespace) -> None:
    from megatron.training.arguments import validate_args  # imported here: accelerator.activate() comes first

    length, chunks = args.seq_length, 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    args.seq_length = max(chunks, length - length % chunks)  # sequences are padded to chunks when they are packed
    try:
        validate_args(args, {})
    except (AssertionError, ValueError, RuntimeError) as error:
        # Many of Megatron's assertions carry no text; then the failed condition itself is shown.
        reason = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigurationError(f"Megatron refuses the flags: {reason}") from error
    args.seq_length = args.encoder_seq_length = length


def _take_architecture(args: Namespace, given: Mapping[str, str]) -> None:
    """Set the architecture arguments to those of the checkpoint; ``given`` flags must agree with them."""
    from megatron.training.checkpointing import load_args_from_checkpoint
    from torch.distributed.checkpoint import CheckpointException

    command_line = Namespace(**vars(args))
    source = "save" if args.resume else "load"
    location = args.resumed or require_checkpoint("--load", args.load)
    try:
        with quiet_megatron(args), restricted_unpickling(), reading(args, location):
            _, saved = load_args_from_checkpoint(args, load_arg=source)
    # Damaged files can raise anything; torch's own error for them is no Exception.
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ConfigurationError(
            f"--{source} {getattr(args, source)}: its checkpoint cannot be read ({reason[0].strip()}); it is damaged"
        ) from error
    if args.resume:
        args.camopd_state = getattr(saved, "camopd_state", None)
    if args.resume and args.camopd_state is None:
        raise ConfigurationError(f"--save {args.save}: its checkpoint is not one of a CaMOPD run; use another folder")
    if args.resume:
        _check_experts_stay(args, saved)
    check_config(location.folder)
    family, arch = read_model(run_assets(args))
    stated = family.stated_arguments(arch)
    megatron_flags.check_same_model(
        command_line,
        given,
        saved,
        source,
        title=family.title,
        stated=stated,
        fixed=family.fixed_arguments,
        foreign=family.foreign_arguments,
    )
    for name in stated:  # Megatron's --use-checkpoint-args leaves some of them out
        setattr(args, name, getattr(saved, name))
    # These belong to the run, not to the model.
    for name in ("seq_length", "attention_dropout", "hidden_dropout", "moe_grouped_gemm"):
        setattr(args, name, getattr(command_line, name))


def _check_experts_stay(args: Namespace, saved: Namespace) -> None:
    """Check that the optimizer's state of the resumed run fits the expert parallelism of this one."""
    size, before = args.expert_model_parallel_size, getattr(saved, "expert_model_parallel_size", 1)
    if size != before and not args.use_distributed_optimizer:
        raise ConfigurationError(
            f"--expert-model-parallel-size {size}: the run in --save {args.save} was saved with {before}; only "
            "--use-distributed-optimizer lets a run go on with another"
        )


def _check_model_fits(args: Namespace) -> None:
    """Check that the model has room for the sequences and can be split as asked."""
    if args.seq_length > args.max_position_embeddings:
        raise ConfigurationError(
            f"--seq-length {args.seq_length}: the model has {args.max_position_embeddings} positions; lower it, or "
            "--max-prompt-length or --max-response-length"
        )
    for what, size in (("attention heads", args.num_attention_heads), ("query groups", args.num_query_groups)):
        if size % args.tensor_model_parallel_size:
            raise ConfigurationError(
                f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: must divide the {size} {what}"
            )
    if args.expert_model_parallel_size > 1:
        _check_experts_fit(args)
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ConfigurationError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: Megatron takes models with experts only "
            "with sequence parallelism beside it; add --sequence-parallel"
        )
    layers_of_stages(args)


def _check_experts_fit(args: Namespace) -> None:
    """Check that the model has experts that can be spread as asked."""
    size, tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    if not args.num_experts:
        raise ConfigurationError(f"--expert-model-parallel-size {size}: the model has no experts; drop it")
    if args.num_experts % size:
        raise ConfigurationError(f"--expert-model-parallel-size {size}: must divide the {args.num_experts} experts")
    if args.moe_ffn_hidden_size % tensor:
        raise ConfigurationError(
            f"--expert-tensor-parallel-size {tensor}: must divide the experts' width of {args.moe_ffn_hidden_size}"
        )
    if isinstance(args.moe_layer_freq, list):
        layers = iter(args.moe_layer_freq)
        stages = [sum(islice(layers, number)) for number in layers_of_stages(args)]
        if 0 in stages:
            raise ConfigurationError(
                f"--pipeline-model-parallel-size {len(stages)}: stage {stages.index(0)} would have dense layers alone; "
                f"with --expert-model-parallel-size {size} every stage must have experts"
            )
