"""Command-line flags: Megatron's own parser with the CaMOPD groups added, checked once, before anything is built.

Megatron's flags keep their names and meaning. Where Megatron's default cannot serve distillation (dropout,
fatal NaN checks, reshardable optimizer checkpoints) or this machine (no CUDA), another default is set on the
parser, so an explicit flag still wins - or, on a machine without CUDA, is refused by name.

The architecture comes from the checkpoint (``--use-checkpoint-args``, always on): the one in ``--save`` when
there is one (the run resumes), else ``--load``.
"""

import argparse
import contextlib
import json
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron_camopd.checkpoint.assets import read_model, run_assets
from megatron_camopd.checkpoint.directory import require_checkpoint
from megatron_camopd.config import checks, megatron_flags
from megatron_camopd.config.byte_size import parse_size
from megatron_camopd.config.stage_checks import STAGES, check_inputs, check_lengths, check_stage
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.startup import quiet_megatron

# What differs from Megatron's defaults everywhere, and why.
_DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,  # gaps compare exact log-probabilities
    "hidden_dropout": 0.0,
    "check_for_nan_in_loss_and_grad": False,  # a bad step is skipped and counted instead of ending the job
    "rerun_mode": "disabled",
    "use_checkpoint_args": True,
    "dist_ckpt_optim_fully_reshardable": True,  # resume at another TP/PP/DP
    "eval_iters": 0,
    "eval_interval": 100,
    "log_interval": 1,
    "enable_one_logger": False,
    # A run may be given more steps later; whether its settings are the same ones is checked here, flag by flag.
    "override_opt_param_scheduler": True,
    "save_interval": 20,  # a failure costs at most these steps; the last step is always saved
    "micro_batch_size": 1,
    # The paper's training settings (appendix A).
    "global_batch_size": 512,
    "train_iters": 120,
    "lr": 2e-6,
    "lr_decay_style": "constant",
}


def add_camopd_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the CaMOPD groups and set this project's defaults; an ``extra_args_provider`` for Megatron."""
    parser.error = _refuse  # type: ignore[method-assign]  # its own prints hundreds of lines of usage first
    stage = parser.add_argument_group("CaMOPD stage", "what this command does")
    stage.add_argument("--stage", choices=STAGES, default="distill",
                       help="distill: on-policy distillation; sft: supervised fine-tuning on --conversations; "
                       "generate: responses of --load to --prompts, as conversations")  # fmt: skip
    stage.add_argument("--dry-run", type=int, nargs="?", const=0, metavar="PROCESSES",
                       help="check everything, print the plan for so many processes (default: those that torchrun "
                       "started) and stop; needs no GPU")  # fmt: skip
    sft = parser.add_argument_group("CaMOPD supervised fine-tuning", "with --stage sft; a batch is --global-batch-size "
                                    "rows of --seq-length tokens, filled with whole conversations")  # fmt: skip
    sft.add_argument("--conversations", nargs="+", metavar="FILE",
                     help='JSONL or Parquet, {"messages": [{"role", "content"}, ...]} a row; the assistant\'s turns '
                     "are trained")  # fmt: skip
    sft.add_argument("--validation-conversations", nargs="+", metavar="FILE",
                     help="their loss is measured every --eval-interval steps and after the last")  # fmt: skip
    sft.add_argument("--overlong-conversations", choices=["truncate-right", "skip"], default="truncate-right",
                     help="what happens to those longer than --seq-length")  # fmt: skip
    generation = parser.add_argument_group("CaMOPD generation", "with --stage generate")
    generation.add_argument("--prompts", nargs="+", metavar="FILE", help="prompts, one response each")
    generation.add_argument("--responses", metavar="FILE", help="JSONL of conversations to write")
    generation.add_argument("--truncated-responses", choices=["drop", "keep"], default="drop",
                            help="what happens to responses that reached --max-response-length")  # fmt: skip

    method = parser.add_argument_group("CaMOPD method", "what is trained on (paper, section 3.3)")
    method.add_argument("--distill-method", choices=list(checks.METHOD_FLAGS), default="camopd",
                        help="objective of the run: camopd alternates branches and selects samples; the others train "
                        "both branches in every step, all samples (mopd), tokens by reward and entropy (relaxed-opd) "
                        "or tokens that the teacher verifies (selectkd)")  # fmt: skip
    method.add_argument("--recovery-steps", type=int, default=3, help="camopd: general steps in a row (n_g)")
    method.add_argument("--preservation-steps", type=int, default=1, help="camopd: domain steps in a row after them")
    method.add_argument("--general-mass-target", type=float, default=0.8, help="camopd: gap mass kept, general steps")
    method.add_argument("--domain-mass-target", type=float, default=0.8, help="camopd: gap mass kept, domain steps")
    method.add_argument("--general-feedback-scale", type=float, default=2.0, help="camopd: r_g, scales general loss")
    method.add_argument("--domain-feedback-scale", type=float, default=1.0, help="camopd: r_d, scales domain loss")
    method.add_argument("--unselected-samples", choices=["drop", "keep"], default="drop",
                        help="camopd: keep trains them too, with scale 1 (ablation)")  # fmt: skip
    method.add_argument("--mixing-ratio", type=_ratio, metavar="G:D",
                        help="all but camopd: general to domain prompts of every step (default: 1:1)")  # fmt: skip
    method.add_argument("--relaxed-opd-floor", choices=["scaled-log", "logit"], default="scaled-log",
                        help="relaxed-opd: reward floor log(l)/(1-l), or log(l/(1-l))")  # fmt: skip
    method.add_argument("--relaxed-opd-lambda", type=float, default=0.1, help="relaxed-opd: l of the floor")
    method.add_argument("--relaxed-opd-entropy-fraction", type=float, default=0.2, metavar="BETA",
                        help="relaxed-opd: share of tokens, the most uncertain, kept in phase 2")  # fmt: skip
    method.add_argument("--relaxed-opd-switch-step", type=int, metavar="STEP",
                        help="relaxed-opd: first step of phase 2 (default: half of --train-iters)")  # fmt: skip
    method.add_argument("--selectkd-verification", choices=["greedy", "speculative"], default="greedy",
                        help="selectkd: student's top id in teacher's top k, or any of k draws accepted")  # fmt: skip
    method.add_argument("--selectkd-candidates", type=int, default=5, metavar="K", help="selectkd: k")
    method.add_argument("--selectkd-rejected-weight", type=float, default=0.01, metavar="BETA",
                        help="selectkd: weight of rejected tokens, 0 masks them")  # fmt: skip
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
    prompts.add_argument("--max-prompt-length", type=int, default=4096, help="tokens of a prompt at most")
    prompts.add_argument("--overlong-prompts", choices=["truncate-left", "skip"], default="truncate-left",
                         help="what happens to longer prompts")  # fmt: skip
    prompts.add_argument("--chat-template-kwargs", type=_json_object, default={}, metavar="JSON",
                         help='arguments of the chat template, e.g. \'{"enable_thinking": false}\'')  # fmt: skip

    rollout = parser.add_argument_group("CaMOPD rollouts", "responses sampled from the student")
    rollout.add_argument("--rollout-engine", choices=["megatron", "vllm"], default="megatron",
                         help="who decodes: megatron, on the trained weights themselves, or vllm, in the same "
                         "processes with weights of its own (for long responses)")  # fmt: skip
    rollout.add_argument("--rollout-temperature", type=float, default=1.0, help="sampling temperature, above 0")
    rollout.add_argument("--max-response-length", type=int, default=32768, help="tokens of a response at most")
    rollout.add_argument("--rollout-batch-size", type=int, default=64,
                         help="megatron engine: sequences decoded at once on a data-parallel rank")  # fmt: skip
    rollout.add_argument("--rollout-mismatch-warning", type=float, metavar="NATS",
                         help="warn when |log mu - log pi| of engine and trainer is larger on average (default: "
                         "2e-4 in float32, 0.02 in float16, 0.1 in bfloat16)")  # fmt: skip

    vllm = parser.add_argument_group("CaMOPD rollouts by vLLM", "with --rollout-engine vllm alone")
    vllm.add_argument("--rollout-tensor-parallel-size", type=int, default=1, metavar="N",
                      help="processes of one engine, whatever the training layout; divides all processes")  # fmt: skip
    vllm.add_argument("--rollout-max-sequences", type=int, default=256, help="sequences one engine decodes at once")
    vllm.add_argument("--rollout-memory-share", type=float, default=0.5,
                      help="share of a GPU's memory that an engine may take, weights included")  # fmt: skip
    vllm.add_argument("--rollout-kv-cache-bytes", type=_size, metavar="SIZE",
                      help="KV cache of a process (default: on a GPU what the share leaves, else 512MiB)")  # fmt: skip
    vllm.add_argument("--rollout-enforce-eager", action="store_true", help="no CUDA graphs")
    vllm.add_argument("--rollout-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
                      help="compute a prefix that several prompts share once")  # fmt: skip
    vllm.add_argument("--rollout-sleep", action=argparse.BooleanOptionalAction, default=True,
                      help="give a GPU's memory back while training")  # fmt: skip
    vllm.add_argument("--rollout-time-limit", type=float, default=0.0, metavar="SECONDS",
                      help="for a step's rollouts; beyond it the run saves and stops (default: none)")  # fmt: skip
    vllm.add_argument("--weight-sync-bucket-size", type=_size, default=512 * 2**20, metavar="SIZE",
                      help="weights gathered at once on their way to the engine (default: 512MiB)")  # fmt: skip
    vllm.add_argument("--rollout-probe-interval", type=int, default=20, metavar="STEPS",
                      help="how often the engine's log-probabilities of a probe are compared with the trainer's; the "
                      "first step always does, 0: no other")  # fmt: skip

    head = parser.add_argument_group("CaMOPD output head", "log-probabilities and loss from the last hidden states")
    head.add_argument("--output-head", choices=["fused", "materialized"], default="fused",
                      help="logits of a few tokens at a time, or all of a microbatch's (to compare)")  # fmt: skip

    diagnostics = parser.add_argument_group("CaMOPD diagnostics", "measured on the way; training does not change")
    diagnostics.add_argument("--gradient-diagnostics-interval", type=int, default=0, metavar="STEPS",
                             help="how often gradients of single samples and of both branches are compared (0: never); "
                             "costs a training pass one sample at a time and probe rollouts")  # fmt: skip
    diagnostics.add_argument("--gradient-diagnostics-samples", type=int, metavar="N",
                             help="samples of the global batch to look at, and probe prompts (default: as many as the "
                             "batch has)")  # fmt: skip

    safety = parser.add_argument_group("CaMOPD safety")
    safety.add_argument("--max-skipped-steps", type=int, default=5,
                        help="stop after this many steps in a row with non-finite loss or gradients")  # fmt: skip
    named = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in _DEFAULTS.items()
                      if not isinstance(value, bool))  # fmt: skip
    parser.add_argument_group("CaMOPD defaults of Megatron's flags", f"{named}; the last step is always saved")
    for action in parser._actions:  # a bare % in one of Megatron's own texts would end --help in a traceback
        action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help) if action.help else action.help
    defaults = _DEFAULTS | accelerator.required_arguments()
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

    parsers: list[ArgumentParser] = []

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        return add_camopd_arguments(parser)

    with _command_line(argv):
        if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv):  # Megatron would drop all flags for it
            raise ConfigurationError("--yaml-cfg: not supported by CaMOPD training; give the settings as flags")
        args = parse_args(add_arguments)
        given = _given_flags(parsers[0], sys.argv[1:])
    if args.dry_run:
        args.world_size = args.dry_run
    accelerator.check_arguments(args)
    check_stage(args, given)
    megatron_flags.check_flags(args, given)
    checks.check_processes(args)
    checks.check_method(args, given)
    checks.check_rollout(args, given)
    check_inputs(args)
    check_lengths(args)
    checks.check_diagnostics(args, given)
    if args.lr_decay_style == "constant" and args.lr_decay_iters is None and args.lr_warmup_fraction is None:
        args.lr_decay_iters = args.lr_warmup_iters + 1  # means nothing, but Megatron wants it longer than the warm-up
    checks.check_schedules(args)
    _take_architecture_from_checkpoint(args, given)
    checks.check_model_fits(args)
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
    _take_architecture_from_checkpoint(args, {})
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
def _command_line(argv: Sequence[str] | None) -> Iterator[None]:
    """Megatron's parser reads ``sys.argv``."""
    before = sys.argv
    if argv is not None:
        sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


def _given_flags(parser: ArgumentParser, words: Sequence[str]) -> dict[str, str]:
    """The flags in ``words``, which did parse: argument name -> flag as written there."""
    options = parser._option_string_actions
    written = (word.split("=")[0] for word in words)
    return {options[flag].dest: flag for flag in written if flag in options}


def _refuse(message: str) -> NoReturn:
    """What argparse found wrong with the command line."""
    raise ConfigurationError(" ".join(message.split()))


def _size(text: str) -> int:
    try:
        return parse_size(text, flag="SIZE")
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("SIZE ")) from error


def _ratio(text: str) -> list[int]:
    """``3:1`` -> [3, 1]."""
    if not re.fullmatch(r"[0-9]+:[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers G:D, such as 3:1")
    return [int(number) for number in text.split(":")]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _take_architecture_from_checkpoint(args: Namespace, given: Mapping[str, str]) -> None:
    """Set the architecture arguments to those of the checkpoint; ``given`` flags must agree with them."""
    from megatron.training.checkpointing import load_args_from_checkpoint
    from torch.distributed.checkpoint import CheckpointException

    command_line = Namespace(**vars(args))
    source = "save" if args.resume else "load"
    try:
        with quiet_megatron(args):
            _, saved = load_args_from_checkpoint(args, load_arg=source)
    # Damaged files can raise anything; torch's own error for them is no Exception.
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ConfigurationError(
            f"--{source} {getattr(args, source)}: its checkpoint cannot be read ({reason[0].strip()}); it is damaged"
        ) from error
    args.camopd_state = getattr(saved, "camopd_state", None) if args.resume else None
    if args.resume and args.camopd_state is None:
        raise ConfigurationError(f"--save {args.save}: its checkpoint is not one of a CaMOPD run; use another folder")
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
    for name in ("seq_length", "attention_dropout", "hidden_dropout"):  # these belong to the run, not to the model
        setattr(args, name, getattr(command_line, name))
