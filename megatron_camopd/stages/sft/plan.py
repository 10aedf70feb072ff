"""Everything that can be checked about supervised fine-tuning before processes meet: tokenizer, files, saved state."""

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_camopd.checkpoint.tokenizer import end_of_sequence_ids, load_tokenizer
from megatron_camopd.checkpoint.training_state import check_settings, read_state, settings_of
from megatron_camopd.data import ConversationFormatter, ConversationSet, ConversationStream, PackedSet, pack_in_order


@dataclass
class SftPlan:
    """The checked inputs of a run. ``validation``: its conversations, packed, or None; ``validation_sha256`` theirs.

    ``settings`` are taken before Megatron fills in flags of its own; ``state`` is that of the checkpoint being
    resumed, or None.
    """

    settings: dict[str, Any]
    stream: ConversationStream
    validation: PackedSet | None
    validation_sha256: str | None
    state: dict[str, Any] | None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the plan, as JSON values: settings and the place in the stream."""
        return {"settings": self.settings, "stream": self.stream.state_dict()}

    def fingerprint(self) -> str:
        """The same text on every rank whose plan is the same."""
        found = {**self.state_dict(), "resumed": self.state, "validation": self.validation_sha256}
        return json.dumps(found, sort_keys=True)


def plan_sft(args: Namespace) -> SftPlan:
    """Read and check all inputs. Errors: ConfigurationError naming the flag or file."""
    settings, state = settings_of(args), None
    if args.resume:
        state = read_state(args)
        check_settings(settings, state["settings"], save=args.save)
    # A run keeps the tokenizer, template and end-of-sequence ids that it started with.
    source = args.save if args.resume else args.load
    tokenizer = load_tokenizer(source)
    progress = os.environ.get("RANK", "0") == "0"

    def formatter() -> ConversationFormatter:
        return ConversationFormatter(
            tokenizer,
            template_kwargs=args.chat_template_kwargs,
            end_of_sequence_ids=end_of_sequence_ids(source, tokenizer),
            max_length=args.seq_length,
            overlong=args.overlong_conversations,
        )

    stream = ConversationStream(
        ConversationSet(args.conversations, flag="--conversations", progress=progress),
        formatter(),
        row_length=args.seq_length,
        seed=args.seed,
        name="sft",
    )
    if state is not None:
        stream.load_state_dict(state["stream"])
    validation = held_out = None
    if args.validation_conversations:  # encoded now: what is wrong with them must not come up after a hundred steps
        held_out = ConversationSet(args.validation_conversations, flag="--validation-conversations", progress=progress)
        validation = pack_in_order(held_out, formatter(), row_length=args.seq_length)
    return SftPlan(settings, stream, validation, None if held_out is None else held_out.sha256, state)
