"""Which flags belong to which ``--stage``, and what supervised fine-tuning and generation need: one-line errors.

As in ``argument_checks``: ``given`` is the command line as Megatron's parser understood it, argument name -> flag as
written.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping

from megatron_camopd.config import checks
from megatron_camopd.errors import ConfigurationError

STAGES = ("distill", "sft", "generate")

# Arguments that some stages alone read: argument -> those stages. What is not named here holds for all.
_DISTILL = (
    "distill_method", *dict.fromkeys(name for names in checks.METHOD_FLAGS.values() for name in names),
    "importance_correction", "importance_low", "importance_high", "general_teacher_load", "domain_teacher_load",
    "general_prompts", "domain_prompts", "rollout_mismatch_warning", "gradient_diagnostics_interval",
    "gradient_diagnostics_samples",
)  # fmt: skip
_ROLLOUTS = (
    "max_prompt_length", "max_response_length", "overlong_prompts", "rollout_engine", "rollout_temperature",
    *checks.NATIVE, *checks.VLLM,
)  # fmt: skip
_TRAINING = ("save", "max_skipped_steps")
STAGES_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_ROLLOUTS, ("distill", "generate")),
    **dict.fromkeys(_DISTILL, ("distill",)),
    **dict.fromkeys(_TRAINING, ("distill", "sft")),
    **dict.fromkeys(("conversations", "validation_conversations", "overlong_conversations"), ("sft",)),
    **dict.fromkeys(("prompts", "responses", "truncated_responses"), ("generate",)),
}


def check_stage(args: Namespace, given: Mapping[str, str]) -> None:
    """Nothing was given that another stage alone reads."""
    for name, flag in given.items():
        if args.stage not in STAGES_OF.get(name, STAGES):
            raise ConfigurationError(f"{flag}: has no effect with --stage {args.stage}; drop one of the two")


def check_inputs(args: Namespace) -> None:
    """Required paths are given and exist, the output can be written; decides ``args.resume``."""
    _FILES[args.stage](args)


def check_lengths(args: Namespace) -> None:
    """Sequences fit ``--seq-length``, ranks share the batch evenly."""
    _LENGTHS[args.stage](args)


def _sft_files(args: Namespace) -> None:
    checks.require_given(args, ("load", "save", "conversations"))
    checks.check_run_folders(args, ("load",))


def _sft_lengths(args: Namespace) -> None:
    checks.check_positive(args, ("seq_length", "micro_batch_size", "global_batch_size", "train_iters"))
    checks.check_shared_batch(args)
    if args.eval_interval is None or args.eval_interval < 1:
        raise ConfigurationError(f"--eval-interval {args.eval_interval}: must be at least 1")
    # Megatron's local attention would hand a packed row to a fused kernel that knows no mask.
    if args.transformer_impl == "local":
        args.masked_softmax_fusion = False


def _generate_files(args: Namespace) -> None:
    checks.require_given(args, ("load", "prompts", "responses"))
    checks.check_output_file("--responses", args.responses)
    checks.check_checkpoints(args, ("load",))
    args.resume = False


def _generate_lengths(args: Namespace) -> None:
    checks.check_response_lengths(args)
    checks.check_positive(args, ("global_batch_size",))
    args.micro_batch_size = 1  # nothing is trained
    checks.check_shared_batch(args)


_FILES: dict[str, Callable[[Namespace], None]] = {
    "distill": checks.check_files, "sft": _sft_files, "generate": _generate_files,
}  # fmt: skip
_LENGTHS: dict[str, Callable[[Namespace], None]] = {
    "distill": checks.check_lengths_and_batch, "sft": _sft_lengths, "generate": _generate_lengths,
}  # fmt: skip
