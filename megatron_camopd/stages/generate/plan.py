"""The plan of a generation run: inputs, and the output written so far, checked before any process group exists.

The responses are appended to ``<file>.partial``; ``<file>.partial.json`` beside it states the inputs and the counts. At
the end the output is ``<file>`` with ``<file>.json``, which is written first: a run that is killed at any moment goes
on when the same command is started again, behind the last round that was written. Other inputs or settings are then
refused.
"""

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_camopd.checkpoint.arguments import check_checkpoints, student_checkpoint
from megatron_camopd.checkpoint.directory import CheckpointLocation, require_checkpoint
from megatron_camopd.checkpoint.json_files import read_json_object
from megatron_camopd.checkpoint.tokenizer import end_of_sequence, load_tokenizer
from megatron_camopd.config.checks import (
    check_output_file,
    check_positive,
    check_response_lengths,
    check_shared_batch,
    refuse_expert_parallelism,
    require_given,
)
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.config.words import check_file
from megatron_camopd.data import ChatFormatter, ConversationFormatter, PromptSet, check_end_of_sequence, read_prompts
from megatron_camopd.data.chat import ChatSettings, PromptSettings
from megatron_camopd.data.row_report import RowReport
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.stages import description
from megatron_camopd.stages.generate.settings import GenerationSettings
from megatron_camopd.stages.row_checks import check_prompts

# The arguments that decide the responses, beside model and prompts.
_SETTINGS = (
    "seed", "rollout_temperature", "max_prompt_length", "max_response_length", "overlong_prompts", "rollout_engine",
    "chat_template_kwargs", "truncated_responses", "global_batch_size",
)  # fmt: skip


@dataclass
class GeneratePlan:
    """The checked inputs of a generation run.

    Attributes:
        prompts: The prompts.
        tokenizer: The model's tokenizer.
        prompt_formatter: Converter of prompts to token ids.
        conversation_formatter: Converter of conversations to token ids, which checks that responses are read back.
        end_of_sequence_ids: The token ids that end a response.
        output: Path of the output file.
        checkpoints: The checkpoint that is loaded, by the text that names its flag and folder in errors.
        identity: The inputs and settings that decide the responses, as JSON values.
        done: The counts after the last round that was written, or of the complete output; empty if there is none.
        complete: Whether the output is complete already.
        report: What the prompts come to, on the process that checks the rows.
    """

    prompts: PromptSet
    tokenizer: Any
    prompt_formatter: ChatFormatter
    conversation_formatter: ConversationFormatter
    end_of_sequence_ids: list[int]
    output: Path
    checkpoints: dict[str, CheckpointLocation]
    identity: dict[str, Any]
    done: dict[str, int]
    complete: bool
    report: RowReport | None

    @property
    def partial(self) -> Path:
        """Path of the file that holds the responses until the output is complete."""
        return self.output.with_name(self.output.name + ".partial")

    def fingerprint(self) -> str:
        """Return a text that is equal on ranks with equal plans."""
        return json.dumps([self.identity, self.done, self.complete], sort_keys=True)

    def note(self, counts: dict[str, int], *, finished: bool = False) -> None:
        """Write inputs and counts to the JSON file beside the partial output or, if ``finished``, the complete one."""
        path = _manifest(self.output) if finished else _manifest(self.partial)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"made_from": self.identity, "counts": counts}, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    def finish(self, counts: dict[str, int]) -> None:
        """Give the responses their final name; whatever was done before an interruption is done again or passed over.

        The manifest comes first: an output without one could not be told from somebody else's file.
        """
        if not self.complete or not _manifest(self.output).exists():
            self.note(counts, finished=True)
        if not self.complete:
            os.replace(self.partial, self.output)
        _manifest(self.partial).unlink(missing_ok=True)


def check_arguments(args: Namespace) -> None:
    """Check files, lengths and batch; this stage never resumes from a checkpoint."""
    require_given(args, ("load", "prompts", "responses"))
    refuse_expert_parallelism(args)
    check_output_file("--responses", args.responses)
    output = Path(args.responses)
    for path in (output, partial := output.with_name(output.name + ".partial"), _manifest(output), _manifest(partial)):
        check_file("--responses", path, "a name for the file to write")
    args.resume, args.resumed, args.camopd_state = False, None, None
    check_checkpoints(args, ("load",))
    check_response_lengths(args)
    check_positive(args, ("global_batch_size",))
    args.micro_batch_size = 1  # without effect, because nothing is trained, but the check below reads it
    check_shared_batch(args)


def lock(args: Namespace) -> tuple[Path, str]:
    """Return the lock file of the output, and the flag and value to name it by."""
    responses = GenerationSettings.of(args).responses
    return Path(f"{responses}.lock"), f"--responses {responses}"


def plan_responses(args: Namespace) -> GeneratePlan:
    """Read and check all inputs.

    Raises:
        ConfigurationError: Names the flag or file.
    """
    flags, prompt_settings, template_kwargs = (
        GenerationSettings.of(args), PromptSettings.of(args), ChatSettings.of(args).chat_template_kwargs,
    )  # fmt: skip
    assert flags.prompts is not None and flags.responses is not None, "checked by check_arguments"
    prompts = read_prompts(flags.prompts, flag="--prompts")
    tokenizer = load_tokenizer(args.load)
    ends, named_in = end_of_sequence(args.load, tokenizer)
    prompt_formatter = ChatFormatter(
        tokenizer,
        template_kwargs=template_kwargs,
        max_prompt_length=prompt_settings.max_prompt_length,
        overlong=prompt_settings.overlong_prompts,
    )
    conversation_formatter = ConversationFormatter(
        tokenizer, template_kwargs=template_kwargs, end_of_sequence_ids=ends, max_length=args.seq_length
    )
    checkpoints = student_checkpoint(args)
    check_end_of_sequence(tokenizer, ends, source=named_in, template_kwargs=template_kwargs)
    report = check_prompts(prompts, prompt_formatter, args.load, answers=conversation_formatter)
    identity = {
        "model": require_checkpoint("--load", args.load).fingerprint(),
        "prompts": prompts.sha256,
        "prompt_count": len(prompts.prompts),
        **{name: getattr(args, name) for name in _SETTINGS},
    }
    output = Path(os.path.abspath(flags.responses))
    plan = GeneratePlan(
        prompts, tokenizer, prompt_formatter, conversation_formatter, ends, output, checkpoints, identity, {},
        complete=False,
        report=report,
    )  # fmt: skip
    if output.exists():
        # Runs of earlier versions could be killed between the renaming of the output and the writing of its manifest.
        unnamed = not _manifest(output).exists() and _manifest(plan.partial).exists() and not plan.partial.exists()
        plan.done = _check_same(plan, plan.partial if unnamed else output)
        plan.complete = True
        _check_length(plan, output)
    elif plan.partial.exists() and _manifest(plan.partial).exists():
        plan.done = _check_same(plan, plan.partial)
        _check_length(plan, plan.partial)
    return plan


def _manifest(output: Path) -> Path:
    return output.with_name(output.name + ".json")


def _check_same(plan: GeneratePlan, file: Path) -> dict[str, int]:
    """Return the counts of ``file``, and check that it was made from the inputs of ``plan``."""
    counts: dict[str, int]
    try:
        found = read_json_object(_manifest(file), "the manifest of the responses")
        made_from, counts = dict(found["made_from"]), dict(found["counts"])
        if not all(type(count) is int and count >= 0 for count in counts.values()):
            raise ValueError("a count is no whole number")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"--responses {plan.output}: {file.name} exists, and {_manifest(file).name} does not say what it was made "
            "from; name another file"
        ) from error
    for name, value in plan.identity.items():
        if made_from.get(name) != value:
            raise ConfigurationError(
                f"--responses {plan.output}: {file.name} was made with {name.replace('_', '-')} {made_from.get(name)}, "
                f"not {value}; name another file, or remove that one"
            )
    return counts


def _check_length(plan: GeneratePlan, file: Path) -> None:
    """Check that ``file`` has the bytes that were counted; a partial one may have more, of an interrupted round."""
    size, counted = file.stat().st_size, plan.done.get("bytes", 0)
    whole = plan.done.get("prompts") == len(plan.prompts.prompts) and size == counted
    if not whole if plan.complete else size < counted or "rounds" not in plan.done:
        raise ConfigurationError(
            f"--responses {plan.output}: {file.name} has {size} bytes, {counted} were written; "
            "it was changed since: name another file, or remove that one"
        )


def describe(args: Namespace, plan: GeneratePlan) -> list[str]:
    """Return the lines of a dry run."""
    sampling = SamplingSettings.of(args)
    count = len(plan.prompts.prompts)
    rows = plan.report.line("--max-prompt-length", PromptSettings.of(args).overlong_prompts) if plan.report else ""
    return [
        *description.model_lines(args, trainable=False),
        f"prompts: {rows or f'{count:,} rows'}; {-(-count // args.global_batch_size)} rounds of "
        f"{args.global_batch_size}",
        f"responses: up to {sampling.max_response_length:,} tokens, {RolloutSettings.of(args).rollout_engine}, "
        f"temperature {sampling.rollout_temperature:g}, to {plan.output}"
        + (" (complete already)" if plan.complete else ""),
        *notes(plan),
    ]


def notes(plan: GeneratePlan) -> list[str]:
    """Return lines about what is not as the prompts may suggest, said once at the start."""
    return [f"prompts: {line}" for line in plan.report.notes()] if plan.report else []
