"""Checks of the chat messages, tool schemas and id of a row, the same for prompts and conversations."""

import json
from typing import Any

from megatron_camopd.data.row_files import fail, shown

ROLES = ("system", "user", "assistant", "tool")


def checked_messages(messages: Any, where: str, flag: str) -> list[dict[str, Any]]:
    """Check chat messages; an assistant message with tool calls may have no content and then gets an empty one.

    Empty lists and objects, such as ``"tool_calls": []``, are dropped: they say what a missing field says.

    Raises:
        ConfigurationError: the messages have a wrong form. The text names ``flag`` and ``where``.
    """
    if not isinstance(messages, list):
        fail(flag, where, f'has "messages" {shown(messages)}; it must be a list of {{"role", "content"}} objects')
    if not messages:
        fail(flag, where, 'has empty "messages"; it must hold at least one message')
    checked: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            fail(flag, where, f'has {name} {shown(message)}; each message must be a {{"role", "content"}} object')
        kept = {key: value for key, value in message.items() if key in ("role", "content") or value not in ([], {})}
        role = kept.get("role")
        if role not in ROLES:  # many templates drop messages of unknown roles silently
            found = "no role" if role is None else f"role {shown(role)}"
            fail(flag, where, f"has {found} in {name}; roles are {', '.join(ROLES)}")
        if role == "assistant" and kept.get("tool_calls"):
            kept.setdefault("content", "")
        content = kept.get("content")
        if not isinstance(content, str):
            found = "no content" if content is None else f"content {shown(content)}"
            fail(flag, where, f"has {found} in {name}; the content must be text")
        if role == "user" and not content.strip():
            fail(flag, where, f"has an empty prompt: the user's {name} has no text; remove the row or fill it")
        checked.append(kept)
    return checked


def checked_tools(tools: Any, where: str, flag: str) -> list[dict[str, Any]] | None:
    """Return the tool schemas as a list of objects, or None if there are none.

    Raises:
        ConfigurationError: ``tools`` is neither a list of objects nor such a list as a JSON string.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            fail(flag, where, f'has "tools" {shown(tools)}, which is not JSON; it must be a list of objects')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        fail(flag, where, f'has "tools" {shown(tools)}; it must be a list of objects')
    return tools or None


def checked_identifier(row: dict[str, Any], default: str, where: str, flag: str) -> str:
    """Return the row's ``id`` as text, or ``default`` if it has none.

    Raises:
        ConfigurationError: the id is neither text nor a whole number.
    """
    identifier = row.get("id")
    if identifier is not None and (isinstance(identifier, bool) or not isinstance(identifier, str | int)):
        fail(flag, where, f'has "id" {shown(identifier)}; it must be text or a whole number')
    return default if identifier is None else str(identifier)
