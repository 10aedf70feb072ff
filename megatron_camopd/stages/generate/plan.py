"""Everything that can be checked about generating responses before processes meet, and what is already written.

The output grows under ``<file>.partial`` with ``<file>.partial.json`` beside it, which says what it is made from; both
are renamed at the end (``<file>`` and ``<file>.json``). Starting the same command again goes on behind the last round
that was written; other settings are refused.
"""

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_camopd.checkpoint.arguments import check_checkpoints
from megatron_camopd.checkpoint.directory import require_checkpoint
from megatron_camopd.checkpoint.tokenizer import end_of_sequence_ids, load_tokenizer
from megatron_camopd.config.checks import (
    check_output_file,
    check_positive,
    check_response_lengths,
    check_shared_batch,
    require_given,
)
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.data import ChatFormatter, ConversationFormatter, PromptSet, read_prompts
from megatron_camopd.data.chat import ChatSettings, PromptSettings
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.stages import description
from megatron_camopd.stages.generate.settings import GenerationSettings

# What decides the responses, beside model, prompts and the chat template.
_SETTINGS = (
    "seed", "rollout_temperature", "max_prompt_length", "max_response_length", "overlong_prompts", "rollout_engine",
    "chat_template_kwargs", "truncated_responses", "global_batch_size",
)  # fmt: skip


@dataclass
class GeneratePlan:
    """The checked inputs. ``identity``: what the responses are made from; ``done``: counts of finished rounds."""

    prompts: PromptSet
    tokenizer: Any
    prompt_formatter: ChatFormatter
    conversation_formatter: ConversationFormatter
    end_of_sequence_ids: list[int]
    output: Path
    identity: dict[str, Any]
    done: dict[str, int]
    complete: bool

    @property
    def partial(self) -> Path:
        """The responses so far."""
        return self.output.with_name(self.output.name + ".partial")

    def fingerprint(self) -> str:
        """The same text on every rank whose plan is the same."""
        return json.dumps([self.identity, self.done, self.complete], sort_keys=True)

    def note(self, counts: dict[str, int], *, finished: bool = False) -> None:
        """Write down what is done: beside the partial file, or beside the finished one."""
        path = _manifest(self.output) if finished else _manifest(self.partial)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"made_from": self.identity, "counts": counts}, indent=1), encoding="utf-8")
        os.replace(temporary, path)


def check_arguments(args: Namespace) -> None:
    """Check files, lengths and batch; nothing of this stage resumes from a checkpoint."""
    require_given(args, ("load", "prompts", "responses"))
    check_output_file("--responses", args.responses)
    check_checkpoints(args, ("load",))
    args.resume = False
    check_response_lengths(args)
    check_positive(args, ("global_batch_size",))
    args.micro_batch_size = 1  # nothing is trained
    check_shared_batch(args)


def plan_responses(args: Namespace) -> GeneratePlan:
    """Read and check all inputs. Errors: ConfigurationError naming the flag or file."""
    flags, prompt_settings, template_kwargs = (
        GenerationSettings.of(args), PromptSettings.of(args), ChatSettings.of(args).chat_template_kwargs,
    )  # fmt: skip
    assert flags.prompts is not None and flags.responses is not None, "checked by check_arguments"
    prompts = read_prompts(flags.prompts, flag="--prompts")
    tokenizer = load_tokenizer(args.load)
    ends = end_of_sequence_ids(args.load, tokenizer)
    prompt_formatter = ChatFormatter(
        tokenizer,
        template_kwargs=template_kwargs,
        max_prompt_length=prompt_settings.max_prompt_length,
        overlong=prompt_settings.overlong_prompts,
    )
    conversation_formatter = ConversationFormatter(
        tokenizer, template_kwargs=template_kwargs, end_of_sequence_ids=ends, max_length=args.seq_length
    )
    identity = {
        "model": require_checkpoint("--load", args.load).fingerprint(),
        "prompts": prompts.sha256,
        "prompt_count": len(prompts.prompts),
        **{name: getattr(args, name) for name in _SETTINGS},
    }
    output = Path(os.path.abspath(flags.responses))
    plan = GeneratePlan(
        prompts, tokenizer, prompt_formatter, conversation_formatter, ends, output, identity, {}, complete=False
    )
    if output.exists():
        _check_same(plan, output)
        plan.complete = True
    elif plan.partial.exists() and _manifest(plan.partial).exists():
        plan.done = _check_same(plan, plan.partial)
    return plan


def _manifest(output: Path) -> Path:
    return output.with_name(output.name + ".json")


def _check_same(plan: GeneratePlan, file: Path) -> dict[str, int]:
    """The counts of ``file``, which must be made from the same as ``plan``."""
    try:
        found = json.loads(_manifest(file).read_text(encoding="utf-8"))
        made_from, counts = found["made_from"], found["counts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
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


def describe(args: Namespace, plan: GeneratePlan) -> list[str]:
    """Return the lines of a dry run."""
    sampling = SamplingSettings.of(args)
    count = len(plan.prompts.prompts)
    return [
        *description.model_lines(args, trainable=False),
        f"prompts: {count:,} in {-(-count // args.global_batch_size)} rounds of {args.global_batch_size}",
        f"responses: up to {sampling.max_response_length:,} tokens, {RolloutSettings.of(args).rollout_engine}, "
        f"temperature {sampling.rollout_temperature:g}, to {plan.output}"
        + (" (complete already)" if plan.complete else ""),
    ]
