"""Command-line flags: Megatron's own parser with the CaMOPD groups added, checked once, before anything is built.

Megatron's flags keep their names and meaning. Where Megatron's default cannot serve distillation (dropout,
fatal NaN checks, reshardable optimizer checkpoints) or this machine (no CUDA), another default is set on the
parser, so an explicit flag still wins - or, on a machine without CUDA, is refused by name.

The architecture comes from the checkpoint (``--use-checkpoint-args``, always on): the one in ``--save`` when
there is one (the run resumes), else ``--load``.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from megatron_camopd import accelerator
from megatron_camopd.checkpoint_directory import find_checkpoint, repair_tracker, require_checkpoint
from megatron_camopd.errors import ConfigurationError

# What differs from Megatron's defaults everywhere, and why.
_DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,  # gaps compare exact log-probabilities
    "hidden_dropout": 0.0,
    "check_for_nan_in_loss_and_grad": False,  # a bad step is skipped and counted instead of ending the job
    "rerun_mode": "disabled",
    "use_checkpoint_args": True,
    "dist_ckpt_optim_fully_reshardable": True,  # resume at another TP/PP/DP
    "eval_iters": 0,
    "log_interval": 1,
    "enable_one_logger": False,
    "micro_batch_size": 1,
    # The paper's training settings (appendix A).
    "global_batch_size": 512,
    "train_iters": 120,
    "lr": 2e-6,
    "lr_decay_style": "constant",
    "max_prompt_length": 4096,
}

# Sizes that --use-checkpoint-args takes from the checkpoint only where no flag gave one.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
          "max_position_embeddings", "vocab_size")  # fmt: skip

# Architecture arguments in a checkpoint that Megatron's own --use-checkpoint-args leaves out.
_ARCHITECTURE_LEFT_OUT = ("qk_layernorm", "layernorm_epsilon", "vocab_size", "make_vocab_size_divisible_by")

# Megatron features that this trainer does not drive: argument -> (value when off, flag).
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "context_parallel_size": (1, "--context-parallel-size"),
    "num_experts": (None, "--num-experts"),
    "num_layers_per_virtual_pipeline_stage": (None, "--num-layers-per-virtual-pipeline-stage"),
    "num_virtual_stages_per_pipeline_rank": (None, "--num-virtual-stages-per-pipeline-rank"),
    "pipeline_model_parallel_layout": (None, "--pipeline-model-parallel-layout"),
    "mtp_num_layers": (None, "--mtp-num-layers"),
    "hybrid_layer_pattern": (None, "--hybrid-layer-pattern"),
    "spec": (None, "--spec"),
    "fp8": (None, "--fp8-format"),
    "fp4": (None, "--fp4-format"),
    "async_save": (False, "--async-save"),
    "use_megatron_fsdp": (False, "--use-megatron-fsdp"),
    "use_torch_fsdp2": (False, "--use-torch-fsdp2"),
    "train_samples": (None, "--train-samples"),
    "rampup_batch_size": (None, "--rampup-batch-size"),
    "step_batch_size_schedule": (None, "--step-batch-size-schedule"),
    "defer_embedding_wgrad_compute": (False, "--defer-embedding-wgrad-compute"),
    "calculate_per_token_loss": (False, "--calculate-per-token-loss"),
    "checkpoint_activations": (False, "--checkpoint-activations"),
    "cuda_graph_impl": ("none", "--cuda-graph-impl"),
    "enable_cuda_graph": (False, "--enable-cuda-graph"),
    "external_cuda_graph": (False, "--external-cuda-graph"),
    "skip_train": (False, "--skip-train"),
    "ckpt_format": ("torch_dist", "--ckpt-format"),
}


def add_camopd_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the CaMOPD groups and set this project's defaults; an ``extra_args_provider`` for Megatron."""
    parser.error = _refuse  # type: ignore[method-assign]  # its own prints hundreds of lines of usage first
    method = parser.add_argument_group("CaMOPD method", "what is trained on (paper, section 3.3)")
    method.add_argument("--distill-method", choices=["camopd"], default="camopd", help="objective of the run")
    method.add_argument("--recovery-steps", type=int, default=3, help="general steps in a row (n_g)")
    method.add_argument("--preservation-steps", type=int, default=1, help="domain steps in a row after them")
    method.add_argument("--general-mass-target", type=float, default=0.8, help="gap mass kept on general steps")
    method.add_argument("--domain-mass-target", type=float, default=0.8, help="gap mass kept on domain steps")
    method.add_argument("--general-feedback-scale", type=float, default=2.0, help="r_g, scales the general loss")
    method.add_argument("--domain-feedback-scale", type=float, default=1.0, help="r_d, scales the domain loss")
    method.add_argument("--importance-correction", choices=["mask", "clip", "none"], default="mask",
                        help="mask: weights outside [low, high] become 0; clip: at most high; none: 1")  # fmt: skip
    method.add_argument("--importance-low", type=float, default=0.5, help="lower bound of the importance weight")
    method.add_argument("--importance-high", type=float, default=5.0, help="upper bound of the importance weight")

    teachers = parser.add_argument_group("CaMOPD teachers", "frozen Megatron checkpoints, kept in host memory")
    teachers.add_argument("--general-teacher-load", metavar="DIR", help="checkpoint of the general model")
    teachers.add_argument("--domain-teacher-load", metavar="DIR",
                          help="checkpoint of the domain teacher (default: the student's initial weights)")  # fmt: skip

    prompts = parser.add_argument_group("CaMOPD prompts", "JSONL or Parquet, one prompt a row")
    prompts.add_argument("--general-prompts", nargs="+", metavar="FILE", help="prompts of general steps")
    prompts.add_argument("--domain-prompts", nargs="+", metavar="FILE", help="prompts of domain steps")
    prompts.add_argument("--max-prompt-length", type=int, help="tokens of a prompt at most (4096)")
    prompts.add_argument("--overlong-prompts", choices=["truncate-left", "skip"], default="truncate-left",
                         help="what happens to longer prompts")  # fmt: skip
    prompts.add_argument("--chat-template-kwargs", type=_json_object, default={}, metavar="JSON",
                         help='arguments of the chat template, e.g. \'{"enable_thinking": false}\'')  # fmt: skip

    rollout = parser.add_argument_group("CaMOPD rollouts", "responses sampled from the student")
    rollout.add_argument("--rollout-engine", choices=["megatron"], default="megatron", help="who decodes")
    rollout.add_argument("--rollout-temperature", type=float, default=1.0, help="sampling temperature, above 0")
    rollout.add_argument("--max-response-length", type=int, default=32768, help="tokens of a response at most")
    rollout.add_argument("--rollout-batch-size", type=int, default=64,
                         help="sequences decoded at once on a data-parallel rank (bounds the KV cache)")  # fmt: skip

    safety = parser.add_argument_group("CaMOPD safety")
    safety.add_argument("--max-skipped-steps", type=int, default=5,
                        help="stop after this many steps in a row with non-finite loss or gradients")  # fmt: skip
    defaults = dict(_DEFAULTS)
    if accelerator.current().kind == "cpu":
        defaults |= accelerator.cpu_required_arguments()
    known = {action.dest for action in parser._actions}
    assert not defaults.keys() - known, f"Megatron no longer has {defaults.keys() - known}"
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    """Parse and check ``argv`` (default: the command line).

    Returns Megatron's validated namespace with the CaMOPD flags and ``resume`` (bool: a checkpoint in ``--save``
    continues). No process group exists yet, nothing was written. Errors: ConfigurationError naming the flag,
    unknown ones included.
    """
    accelerator.activate()
    from megatron.training.arguments import parse_args, validate_args

    with _command_line(argv):
        if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv):  # Megatron would drop all flags for it
            raise ConfigurationError("--yaml-cfg: not supported by CaMOPD training; give the settings as flags")
        args = parse_args(add_camopd_arguments)
    _check_accelerator(args)
    _check_method(args)
    _check_files(args)
    _check_lengths_and_batch(args)
    _take_architecture_from_checkpoint(args)
    _check_architecture(args)
    args.save_interval = args.save_interval or args.train_iters  # at the end at least
    with quiet_megatron(args):
        try:
            validate_args(args, {})
        except (AssertionError, ValueError, RuntimeError) as error:
            # Many of Megatron's assertions carry no text; then the failed condition itself is shown.
            reason = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
            raise ConfigurationError(f"Megatron refuses the flags: {reason}") from error
    args.padded_vocab_size = padded_vocab_size(args)
    return args


def model_arguments(checkpoint: str) -> Namespace:
    """Validated arguments of one process that only runs the model in ``checkpoint``, in float32."""
    accelerator.activate()
    from megatron.training.arguments import parse_args, validate_args

    require_checkpoint("--load", checkpoint)
    with _command_line(["--load", checkpoint, "--global-batch-size", "1"]):
        args = parse_args(add_camopd_arguments)
    args.resume = False
    _take_architecture_from_checkpoint(args)
    args.seq_length = args.max_position_embeddings
    with quiet_megatron(args):
        validate_args(args, {})
    args.padded_vocab_size = padded_vocab_size(args)
    return args


def padded_vocab_size(args: Namespace) -> int:
    """Rows of the embedding: the real vocabulary rounded up so that every tensor-parallel rank gets as many."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-args.vocab_size // multiple) * multiple


@contextlib.contextmanager
def quiet_megatron(args: Namespace) -> Iterator[None]:
    """Keep Megatron's start-up reports (hundreds of lines) off the console, unless ``--logging-level`` asks."""
    if args.logging_level is not None and args.logging_level <= logging.INFO:
        yield
        return
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _command_line(argv: Sequence[str] | None) -> Iterator[None]:
    """Megatron's parser reads ``sys.argv``."""
    before = sys.argv
    if argv is not None:
        sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


def _refuse(message: str) -> NoReturn:
    """What argparse found wrong with the command line."""
    raise ConfigurationError(" ".join(message.split()))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _check_accelerator(args: Namespace) -> None:
    if accelerator.current().kind == "cpu":
        for name, required in accelerator.cpu_required_arguments().items():
            value = getattr(args, name)
            if value != required:
                flag = "--" + name.replace("_", "-")
                shown = getattr(value, "name", value)
                wanted = getattr(required, "name", required)
                raise ConfigurationError(f"{flag} is {shown}, but a machine without CUDA needs {wanted}; drop the flag")
    for name, (off, flag) in _UNSUPPORTED.items():
        value = getattr(args, name)
        if value not in (off, None):
            raise ConfigurationError(f"{flag} {value}: not supported by CaMOPD training; leave it at {off}")
    for flag in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(args, flag) < 1:
            raise ConfigurationError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    layout = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % layout:
        raise ConfigurationError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} = {layout} does not divide the {args.world_size} processes; "
            f"start a multiple of {layout} (torchrun --nproc-per-node)"
        )


def _check_method(args: Namespace) -> None:
    for flag in ("general_mass_target", "domain_mass_target"):
        if not 0 < getattr(args, flag) <= 1:
            raise ConfigurationError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be in (0, 1]")
    for flag in ("general_feedback_scale", "domain_feedback_scale"):
        if not 0 < getattr(args, flag) < float("inf"):
            raise ConfigurationError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be a positive number")
    if not 0 <= args.importance_low <= args.importance_high:
        raise ConfigurationError(
            f"--importance-low {args.importance_low} and --importance-high {args.importance_high}: "
            "need 0 <= low <= high"
        )
    for flag, least in (("recovery_steps", 0), ("preservation_steps", 0), ("max_skipped_steps", 1),
                        ("rollout_batch_size", 1), ("seed", 1)):  # fmt: skip
        if getattr(args, flag) < least:
            raise ConfigurationError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")
    if args.recovery_steps + args.preservation_steps == 0:
        raise ConfigurationError("--recovery-steps 0 and --preservation-steps 0: at least one must be positive")
    if not 0 <= args.lr < float("inf"):
        raise ConfigurationError(f"--lr {args.lr}: must be a number, 0 or more")
    if not 0 < args.rollout_temperature < float("inf"):
        raise ConfigurationError(f"--rollout-temperature {args.rollout_temperature}: must be above 0")


def _check_files(args: Namespace) -> None:
    """Required paths are given and exist; ``--save`` can be written; decides whether the run resumes."""
    for flag in ("load", "save", "general_teacher_load", "general_prompts", "domain_prompts"):
        needed = not (
            (flag.startswith("general") and args.recovery_steps == 0)
            or (flag.startswith("domain") and args.preservation_steps == 0)
        )
        if needed and not getattr(args, flag):
            raise ConfigurationError(f"--{flag.replace('_', '-')}: missing; it has no default")
    _check_writable("--save", args.save)
    if args.tensorboard_dir is not None:
        _check_writable("--tensorboard-dir", args.tensorboard_dir)
    resumed = find_checkpoint(args.save)
    args.resume = resumed is not None and resumed.iteration is not None
    if resumed is not None and resumed.iteration is None:
        raise ConfigurationError(f"--save {args.save}: holds a converted model; give training a folder of its own")
    if resumed is not None:
        repair_tracker(resumed)
    for flag in ("load", "general_teacher_load", "domain_teacher_load"):
        directory = getattr(args, flag)
        if directory is not None:
            require_checkpoint(f"--{flag.replace('_', '-')}", directory)
            setattr(args, flag, os.path.abspath(directory))


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


def _check_lengths_and_batch(args: Namespace) -> None:
    for flag in ("max_prompt_length", "max_response_length", "micro_batch_size", "global_batch_size", "train_iters"):
        if getattr(args, flag) < 1:
            raise ConfigurationError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    longest = args.max_prompt_length + args.max_response_length
    if args.seq_length is None:
        args.seq_length = longest
    if longest > args.seq_length:
        raise ConfigurationError(
            f"--seq-length {args.seq_length}: too short for --max-prompt-length {args.max_prompt_length} + "
            f"--max-response-length {args.max_response_length} = {longest}"
        )
    data_parallel = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    share = data_parallel * args.micro_batch_size
    if args.global_batch_size % share:
        raise ConfigurationError(
            f"--global-batch-size {args.global_batch_size}: must be a multiple of {share} "
            f"(data-parallel size {data_parallel} x --micro-batch-size {args.micro_batch_size})"
        )


def _take_architecture_from_checkpoint(args: Namespace) -> None:
    from megatron.training.checkpointing import load_args_from_checkpoint
    from torch.distributed.checkpoint import CheckpointException

    given = {name: getattr(args, name) for name in ("seq_length", "attention_dropout", "hidden_dropout")}
    source = "save" if args.resume else "load"
    flags = {name: getattr(args, name) for name in _SIZES}
    try:
        with quiet_megatron(args):
            _, saved = load_args_from_checkpoint(args, load_arg=source)
    # Damaged files can raise anything; torch's own error for them is no Exception.
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ConfigurationError(
            f"--{source} {getattr(args, source)}: its checkpoint cannot be read ({reason[0].strip()}); it is damaged"
        ) from error
    for name, value in flags.items():
        if value not in (None, getattr(saved, name)):
            raise ConfigurationError(
                f"--{name.replace('_', '-')} {value}: the model in --{source} {getattr(args, source)} has "
                f"{getattr(saved, name)}; drop the flag"
            )
    for name in _ARCHITECTURE_LEFT_OUT:
        if getattr(saved, name, None) is None:
            raise ConfigurationError(f"--{source} {getattr(args, source)}: its arguments lack {name}; convert it again")
        setattr(args, name, getattr(saved, name))
    args.camopd_state = getattr(saved, "camopd_state", None) if args.resume else None
    for name, value in given.items():  # these belong to the run, not to the model
        setattr(args, name, value)


def _check_architecture(args: Namespace) -> None:
    if args.seq_length > args.max_position_embeddings:
        raise ConfigurationError(
            f"--seq-length {args.seq_length}: the model has {args.max_position_embeddings} positions; "
            "lower --max-prompt-length or --max-response-length"
        )
    for name, size in (("attention heads", args.num_attention_heads), ("query groups", args.num_query_groups)):
        if size % args.tensor_model_parallel_size:
            raise ConfigurationError(
                f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: must divide the {size} {name}"
            )
    if args.num_layers % args.pipeline_model_parallel_size:
        raise ConfigurationError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}: must divide the "
            f"{args.num_layers} layers"
        )
