"""Settings of the stage ``generate``."""

from dataclasses import dataclass
from typing import Literal

from megatron_camopd.config.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """CaMOPD generation: with --stage generate."""

    prompts: list[str] | None = setting(None, metavar="FILE")
    """prompts, one response each"""

    responses: str | None = setting(None, metavar="FILE")
    """JSONL of conversations to write"""

    truncated_responses: Literal["drop", "keep"] = setting("drop")
    """what happens to responses that reached --max-response-length"""
