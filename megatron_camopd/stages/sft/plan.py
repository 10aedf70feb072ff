"""The plan of supervised fine-tuning: tokenizer, files and saved state, checked before any process group exists."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_camopd.checkpoint.arguments import check_run_folders, student_checkpoint
from megatron_camopd.checkpoint.directory import CheckpointLocation
from megatron_camopd.checkpoint.origin import origin
from megatron_camopd.checkpoint.tokenizer import end_of_sequence, load_tokenizer
from megatron_camopd.checkpoint.training_state import comparing_state, read_state
from megatron_camopd.config.checks import check_positive, check_shared_batch, require_given
from megatron_camopd.config.resume import check_kept_settings
from megatron_camopd.data import (
    ConversationFormatter,
    ConversationSet,
    ConversationStream,
    PackedSet,
    check_end_of_sequence,
    pack_in_order,
)
from megatron_camopd.data.chat import ChatSettings
from megatron_camopd.data.row_report import RowReport
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.stages import description
from megatron_camopd.stages.metrics import FILE, check_record_file
from megatron_camopd.stages.row_checks import check_conversations, checks_rows
from megatron_camopd.stages.sft.settings import SftSettings


@dataclass
class SftPlan:
    """The checked inputs of a supervised fine-tuning run.

    Attributes:
        settings: The settings that a resumed run must keep, by argument name.
        stream: The conversations to train on.
        validation: The packed validation conversations, or None.
        validation_sha256: Hash of the validation conversations, or None.
        checkpoints: The checkpoint that is loaded, by the text that names its flag and folder in errors.
        origin: What the run started from (``checkpoint.origin``).
        state: The state in the checkpoint that is resumed, or None in a new run.
        report: What the conversations come to, on the process that checks the rows.
        validation_report: The same of the validation conversations, if there are any.
    """

    settings: dict[str, Any]
    stream: ConversationStream
    validation: PackedSet | None
    validation_sha256: str | None
    checkpoints: dict[str, CheckpointLocation]
    origin: dict[str, Any]
    state: dict[str, Any] | None
    report: RowReport | None
    validation_report: RowReport | None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the plan, as JSON values: settings and the position in the stream."""
        return {"settings": self.settings, "origin": self.origin, "stream": self.stream.state_dict()}

    def fingerprint(self) -> str:
        """Return a text that is equal on ranks with equal plans."""
        found = {**self.state_dict(), "resumed": self.state, "validation": self.validation_sha256}
        return json.dumps(found, sort_keys=True)


def check_arguments(args: Namespace) -> None:
    """Check files and folders, numbers and batch, and set ``args.resume``."""
    require_given(args, ("load", "save", "conversations"))
    check_record_file(args.save, FILE)
    check_run_folders(args, ("load",), FILE)
    check_positive(args, ("seq_length", "micro_batch_size", "global_batch_size", "train_iters"))
    check_shared_batch(args)
    if args.eval_interval is None or args.eval_interval < 1:
        raise ConfigurationError(f"--eval-interval {args.eval_interval}: must be at least 1")


def plan_sft(args: Namespace) -> SftPlan:
    """Read and check all inputs.

    Raises:
        ConfigurationError: Names the flag or file.
    """
    state = read_state(args)
    with comparing_state(args, state):
        if state is not None:
            check_kept_settings(args.kept_settings, state["settings"], save=args.save)
        started_from = origin(args, state)
    # A run keeps the tokenizer, template and end-of-sequence ids that it started with.
    source = args.save if args.resume else args.load
    tokenizer = load_tokenizer(source)
    ends, named_in = end_of_sequence(source, tokenizer)
    check_end_of_sequence(tokenizer, ends, source=named_in, template_kwargs=ChatSettings.of(args).chat_template_kwargs)
    files = SftSettings.of(args).conversations or []
    conversations = ConversationSet(files, flag="--conversations", progress=checks_rows())
    report = check_conversations(
        conversations,
        _formatter(args, tokenizer, ends),
        source,
        row_length=args.seq_length,
        batch_rows=args.global_batch_size,
    )
    stream = ConversationStream(
        conversations, _formatter(args, tokenizer, ends), row_length=args.seq_length, seed=args.seed, name="sft"
    )
    with comparing_state(args, state):
        if state is not None:
            _check_same_splitting(args, state, report)
            stream.load_state_dict(state["stream"])
    validation, validation_sha256, validation_report = _validation(args, _formatter(args, tokenizer, ends), source)
    return SftPlan(
        settings=args.kept_settings,
        stream=stream,
        validation=validation,
        validation_sha256=validation_sha256,
        checkpoints=student_checkpoint(args),
        origin=started_from,
        state=state if args.resume else None,
        report=report,
        validation_report=validation_report,
    )


def _formatter(args: Namespace, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> ConversationFormatter:
    """Return a new encoder; each use of its own has one, because an encoder keeps counts of its last row."""
    return ConversationFormatter(
        tokenizer,
        template_kwargs=ChatSettings.of(args).chat_template_kwargs,
        end_of_sequence_ids=ends,
        max_length=args.seq_length,
        overlong=SftSettings.of(args).overlong_conversations,
    )


def _validation(
    args: Namespace, formatter: ConversationFormatter, source: str
) -> tuple[PackedSet | None, str | None, RowReport | None]:
    """Return the packed validation conversations, the hash of their files and their report, or nothing.

    They are encoded now, so that a mistake in them does not end the run after many steps.
    """
    files = SftSettings.of(args).validation_conversations
    if not files:
        return None, None, None
    held_out = ConversationSet(files, flag="--validation-conversations", progress=checks_rows())
    report = check_conversations(held_out, formatter, source, row_length=args.seq_length, batch_rows=None)
    return pack_in_order(held_out, formatter, row_length=args.seq_length), held_out.sha256, report


def _check_same_splitting(args: Namespace, state: dict[str, Any], report: RowReport | None) -> None:
    """Check that a run that was saved before conversations were split has none that would be split now.

    Raises:
        ConfigurationError: it has: the rest of the run would be trained on other tokens than its beginning.
    """
    if report is not None and report.split and "split" not in state["stream"]:
        raise ConfigurationError(
            f"--save {args.save}: was saved by a version that did not split conversations into their turns, as would "
            f"now be done with {report.split:,} of --conversations; finish it with that version, or give a new --save"
        )


def describe(args: Namespace, plan: SftPlan) -> list[str]:
    """Return the lines of a dry run."""
    share, microbatches = description.microbatches(args)
    every = f", every {args.eval_interval} steps"
    validation = "validation: none" if plan.validation is None else plan.validation.summary("validation") + every
    return [
        *description.model_lines(args),
        description.steps(args, plan.state),
        f"batch: {args.global_batch_size} rows of {args.seq_length:,} tokens, {share} on a data-parallel rank in "
        f"{microbatches} if full: at most {args.global_batch_size * args.seq_length:,} tokens a step",
        *_row_lines(args, "conversations", plan.report),
        validation,
        *_row_lines(args, "validation conversations", plan.validation_report),
    ]


def _row_lines(args: Namespace, name: str, report: RowReport | None) -> list[str]:
    """Return the lines about the rows of one flag; none on the processes that do not check them."""
    if report is None:
        return []
    rows = report.line("--seq-length", SftSettings.of(args).overlong_conversations)
    return [f"{name}: {rows}", *(f"{name}: {line}" for line in report.notes())]


def notes(plan: SftPlan) -> list[str]:
    """Return lines about what is not as the data may suggest, said once at the start."""
    found = {"--conversations": plan.report, "--validation-conversations": plan.validation_report}
    return [f"{flag}: {line}" for flag, report in found.items() if report for line in report.notes()]
