"""Files in the layout of Nemotron's splits."""

import json
from pathlib import Path
from typing import Any

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


SPLIT_FILES = {"chat": "chat", "code": "code", "math": "math", "stem": "stem", "tool_calling": "tool"}


def row(split: str, number: int, content: str, **changes: Any) -> dict[str, Any]:
    """One row of the real layout; the answer is text that no output may hold."""
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    messages = [
        {"role": "system", "content": "a system text", "tool_calls": None},
        {"role": "user", "content": content, "tool_calls": None},
        {"role": "assistant", "content": f"SECRET {number}", "tool_calls": calls if split == "tool_calling" else None},
    ]
    metadata = json.dumps({"tools": TOOLS} if split == "tool_calling" else {"origin": "x"})
    return {
        "uuid": f"{split}-{number}", "license": "cc", "generator": "g", "version": "v1", "category": split,
        "reasoning": "off", "messages": messages, "metadata": metadata,
    } | changes  # fmt: skip


def prompts(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
