"""Settings of supervised fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from megatron_camopd.config.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class SftSettings(Settings):
    """CaMOPD supervised fine-tuning: with --stage sft.

    A batch is --global-batch-size rows of --seq-length tokens, filled with whole conversations.
    """

    conversations: list[str] | None = setting(None, metavar="FILE")
    """JSONL or Parquet, {"messages": [{"role", "content"}, ...]} a row; the assistant's turns are trained"""

    validation_conversations: list[str] | None = setting(None, metavar="FILE")
    """their loss is measured every --eval-interval steps and after the last"""

    overlong_conversations: Literal["truncate-right", "skip"] = setting("truncate-right", kept=True)
    """what happens to those longer than --seq-length"""
