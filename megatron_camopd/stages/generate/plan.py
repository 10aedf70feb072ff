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

from megatron_camopd.checkpoint.directory import require_checkpoint
from megatron_camopd.checkpoint.tokenizer import end_of_sequence_ids, load_tokenizer
from megatron_camopd.data import ChatFormatter, ConversationFormatter, PromptSet, read_prompts
from megatron_camopd.errors import ConfigurationError

# What decides the responses, beside model, prompts and the chat template.
_SETTINGS = (
    "seed", "rollout_temperature", "max_prompt_length", "max_response_length", "overlong_prompts", "rollout_engine",
    "chat_template_kwargs", "truncated_responses", "global_batch_size",
)  # fmt: skip


@dataclass
class ResponsePlan:
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


def plan_responses(args: Namespace) -> ResponsePlan:
    """Read and check all inputs. Errors: ConfigurationError naming the flag or file."""
    prompts = read_prompts(args.prompts, flag="--prompts")
    tokenizer = load_tokenizer(args.load)
    ends = end_of_sequence_ids(args.load, tokenizer)
    prompt_formatter = ChatFormatter(
        tokenizer,
        template_kwargs=args.chat_template_kwargs,
        max_prompt_length=args.max_prompt_length,
        overlong=args.overlong_prompts,
    )
    conversation_formatter = ConversationFormatter(
        tokenizer, template_kwargs=args.chat_template_kwargs, end_of_sequence_ids=ends, max_length=args.seq_length
    )
    identity = {
        "model": require_checkpoint("--load", args.load).fingerprint(),
        "prompts": prompts.sha256,
        "prompt_count": len(prompts.prompts),
        **{name: getattr(args, name) for name in _SETTINGS},
    }
    output = Path(os.path.abspath(args.responses))
    plan = ResponsePlan(
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


def _check_same(plan: ResponsePlan, file: Path) -> dict[str, int]:
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
