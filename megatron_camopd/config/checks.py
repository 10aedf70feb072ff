"""What can be wrong with the flags of a training run: each check raises ConfigurationError with one line.

Values out of range, flags that do not go together, and files that are not there; ``megatron_flags`` has what must not
be given at all. ``given`` is the command line as Megatron's parser understood it, argument name -> flag as written, so
that a flag is never confused with a default.
"""

import importlib.util
import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence

from megatron_camopd.batch import Branch
from megatron_camopd.checkpoint.directory import find_checkpoint, repair_tracker, require_checkpoint
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime.layout import LayoutSizes
from megatron_camopd.schedule import schedule_of

# What one value of --distill-method alone reads; the rest of the method's flags hold for all.
_MIXED = ("mixing_ratio",)
METHOD_FLAGS: dict[str, tuple[str, ...]] = {
    "camopd": (
        "recovery_steps", "preservation_steps", "general_mass_target", "domain_mass_target", "general_feedback_scale",
        "domain_feedback_scale", "unselected_samples",
    ),
    "mopd": _MIXED,
    "relaxed-opd": (
        *_MIXED, "relaxed_opd_floor", "relaxed_opd_lambda", "relaxed_opd_entropy_fraction", "relaxed_opd_switch_step",
    ),
    "selectkd": (*_MIXED, "selectkd_verification", "selectkd_candidates", "selectkd_rejected_weight"),
}  # fmt: skip

# What one rollout engine alone reads: megatron, vllm.
NATIVE = ("rollout_batch_size",)
VLLM = (
    "rollout_tensor_parallel_size", "rollout_max_sequences", "rollout_memory_share", "rollout_kv_cache_bytes",
    "rollout_enforce_eager", "rollout_prefix_caching", "rollout_sleep", "rollout_time_limit", "weight_sync_bucket_size",
    "rollout_probe_interval",
)  # fmt: skip


def check_processes(args: Namespace) -> None:
    """Tensor and pipeline parallelism divide the processes."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(args, name) < 1:
            raise ConfigurationError(f"{_flag(name)} {getattr(args, name)}: must be at least 1")
    layout = LayoutSizes.of(args).model
    if args.world_size % layout:
        raise ConfigurationError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} = {layout} does not divide the {args.world_size} processes; "
            f"start a multiple of {layout} (torchrun --nproc-per-node)"
        )


def check_method(args: Namespace, given: Mapping[str, str]) -> None:
    """The method's flags are its own and in range, and so are the optimizer's; fills in what depends on others."""
    own = METHOD_FLAGS[args.distill_method]
    for name in dict.fromkeys(name for names in METHOD_FLAGS.values() for name in names):
        if name in given and name not in own:
            raise ConfigurationError(
                f"{given[name]}: has no effect with --distill-method {args.distill_method}; drop one of the two"
            )
    if "mixing_ratio" in own and args.mixing_ratio is None:
        args.mixing_ratio = [1, 1]
    if "relaxed_opd_switch_step" in own and args.relaxed_opd_switch_step is None:
        args.relaxed_opd_switch_step = max(args.train_iters, 0) // 2
    for name in ("general_mass_target", "domain_mass_target", "relaxed_opd_entropy_fraction"):
        if not 0 < getattr(args, name) <= 1:
            raise ConfigurationError(f"{_flag(name)} {getattr(args, name)}: must be in (0, 1]")
    if not 0 <= args.selectkd_rejected_weight <= 1:
        raise ConfigurationError(f"--selectkd-rejected-weight {args.selectkd_rejected_weight}: must be in [0, 1]")
    for name in ("general_feedback_scale", "domain_feedback_scale"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigurationError(f"{_flag(name)} {getattr(args, name)}: must be a positive number")
    if not 0 <= args.importance_low <= args.importance_high:
        raise ConfigurationError(
            f"--importance-low {args.importance_low} and --importance-high {args.importance_high}: "
            "need 0 <= low <= high"
        )
    for name, least in (("recovery_steps", 0), ("preservation_steps", 0), ("max_skipped_steps", 1),
                        ("rollout_batch_size", 1), ("seed", 1), ("save_interval", 1), ("selectkd_candidates", 1),
                        ("relaxed_opd_switch_step", 0)):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigurationError(f"{_flag(name)} {getattr(args, name)}: must be at least {least}")
    schedule_of(args)
    if not 0 <= args.lr < float("inf"):
        raise ConfigurationError(f"--lr {args.lr}: must be a number, 0 or more")
    if not 0 < args.rollout_temperature < float("inf"):
        raise ConfigurationError(f"--rollout-temperature {args.rollout_temperature}: must be above 0")


def check_rollout(args: Namespace, given: Mapping[str, str]) -> None:
    """The rollout engine's flags are its own, and in range."""
    with_vllm = args.rollout_engine == "vllm"
    for name in NATIVE if with_vllm else VLLM:
        if name in given:
            raise ConfigurationError(
                f"{given[name]}: has no effect with --rollout-engine {args.rollout_engine}; drop one of the two"
            )
    if not with_vllm:
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError("--rollout-engine vllm: vllm is not installed; run `make setup EXTRAS=vllm`")
    for name, least in (("rollout_tensor_parallel_size", 1), ("rollout_max_sequences", 1),
                        ("rollout_time_limit", 0), ("rollout_probe_interval", 0)):  # fmt: skip
        if not getattr(args, name) >= least:
            raise ConfigurationError(f"{_flag(name)} {getattr(args, name)}: must be at least {least}")
    if args.world_size % args.rollout_tensor_parallel_size:
        raise ConfigurationError(
            f"--rollout-tensor-parallel-size {args.rollout_tensor_parallel_size}: must divide the {args.world_size} "
            "processes"
        )
    if not 0 < args.rollout_memory_share < 1:
        raise ConfigurationError(f"--rollout-memory-share {args.rollout_memory_share}: must be between 0 and 1")


def check_files(args: Namespace) -> None:
    """Required paths are given and exist; ``--save`` can be written; decides ``args.resume``: the run resumes."""
    branches = schedule_of(args).branches
    idle = {f"{branch.value}_{what}" for branch in Branch if branch not in branches
            for what in ("teacher_load", "prompts")}  # fmt: skip
    needed = ("load", "save", "general_teacher_load", "general_prompts", "domain_prompts")
    require_given(args, [name for name in needed if name not in idle])
    check_run_folders(args, ("load", "general_teacher_load", "domain_teacher_load"))


def require_given(args: Namespace, names: Sequence[str]) -> None:
    """Every argument of ``names`` has a value."""
    for name in names:
        if not getattr(args, name):
            raise ConfigurationError(f"{_flag(name)}: missing; it has no default")


def check_run_folders(args: Namespace, checkpoints: Sequence[str]) -> None:
    """``--save`` can be written, and holds a run to resume (``args.resume``) or none; ``checkpoints`` exist."""
    _check_writable("--save", args.save)
    if args.tensorboard_dir is not None:
        _check_writable("--tensorboard-dir", args.tensorboard_dir)
    resumed = find_checkpoint(args.save)
    args.resume = resumed is not None and resumed.iteration is not None
    if resumed is not None and resumed.iteration is None:
        raise ConfigurationError(f"--save {args.save}: holds a converted model; give training a folder of its own")
    if resumed is not None:
        repair_tracker(resumed)
    check_checkpoints(args, checkpoints)


def check_checkpoints(args: Namespace, names: Sequence[str]) -> None:
    """The arguments of ``names`` that are given hold Megatron checkpoints; makes their paths absolute."""
    for name in names:
        directory = getattr(args, name)
        if directory is not None:
            require_checkpoint(_flag(name), directory)
            setattr(args, name, os.path.abspath(directory))


def check_output_file(flag: str, path: str) -> None:
    """``path`` is no folder, and its folder can be written."""
    if os.path.isdir(path):
        raise ConfigurationError(f"{flag} {path}: is a folder; name a file")
    _check_writable(flag, os.path.dirname(os.path.abspath(path)))


def check_positive(args: Namespace, names: Sequence[str]) -> None:
    """The numbers of ``names`` are given and at least 1."""
    for name in names:
        value = getattr(args, name)
        if value is None:
            raise ConfigurationError(f"{_flag(name)}: missing; it has no default")
        if value < 1:
            raise ConfigurationError(f"{_flag(name)} {value}: must be at least 1")


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


def check_lengths_and_batch(args: Namespace) -> None:
    """Prompt and response fit ``--seq-length`` (set here if it was not given); ranks share the batch evenly."""
    check_positive(args, ("micro_batch_size", "global_batch_size", "train_iters"))
    check_response_lengths(args)
    check_shared_batch(args)
    schedule_of(args).composition(0, args.global_batch_size)


def check_diagnostics(args: Namespace, given: Mapping[str, str]) -> None:
    """The diagnostics' samples are shared evenly; sets their number if it was not given."""
    if args.gradient_diagnostics_interval < 0:
        raise ConfigurationError(
            f"--gradient-diagnostics-interval {args.gradient_diagnostics_interval}: must be 0 (off) or more"
        )
    if args.gradient_diagnostics_samples is None:
        args.gradient_diagnostics_samples = args.global_batch_size
    elif not args.gradient_diagnostics_interval:
        flag = given["gradient_diagnostics_samples"]
        raise ConfigurationError(f"{flag}: has no effect without --gradient-diagnostics-interval; give both")
    data_parallel = LayoutSizes.of(args).data
    samples = args.gradient_diagnostics_samples
    if samples < 1 or samples % data_parallel or samples > args.global_batch_size:
        raise ConfigurationError(
            f"--gradient-diagnostics-samples {samples}: must be a multiple of the data-parallel size {data_parallel}, "
            f"from 1 to --global-batch-size {args.global_batch_size}"
        )


def check_schedules(args: Namespace) -> None:
    """What Megatron's schedules of learning rate and weight decay insist on."""
    for name in ("min_lr", "lr_warmup_init"):
        if not 0 <= getattr(args, name) <= args.lr:
            raise ConfigurationError(f"{_flag(name)} {getattr(args, name)}: must be from 0 to --lr {args.lr}")
    length = "train_iters" if args.lr_decay_iters is None else "lr_decay_iters"
    if not 0 <= args.lr_warmup_iters < getattr(args, length):
        raise ConfigurationError(
            f"--lr-warmup-iters {args.lr_warmup_iters}: must be from 0 to below {_flag(length)} {getattr(args, length)}"
        )
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


def check_model_fits(args: Namespace) -> None:
    """The model, whose sizes are in ``args`` by now, has room for the sequences and can be split as asked."""
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
    if args.selectkd_candidates > args.vocab_size:
        raise ConfigurationError(
            f"--selectkd-candidates {args.selectkd_candidates}: the vocabulary has {args.vocab_size} ids; use fewer"
        )
    if args.num_layers % args.pipeline_model_parallel_size:
        raise ConfigurationError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}: must divide the "
            f"{args.num_layers} layers"
        )
    size, groups = args.rollout_tensor_parallel_size, args.num_query_groups
    vocabulary = -(-args.vocab_size // 64) * 64  # as vLLM pads it
    if (
        args.num_attention_heads % size
        or args.ffn_hidden_size % size
        or vocabulary % size
        or (groups % size and size % groups)
    ):
        raise ConfigurationError(
            f"--rollout-tensor-parallel-size {size}: must divide the {args.num_attention_heads} attention heads, "
            f"{args.ffn_hidden_size} feed-forward columns and {vocabulary} vocabulary rows, and divide the {groups} "
            "query groups or be a multiple of them"
        )


def _check_writable(flag: str, directory: str) -> None:
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
