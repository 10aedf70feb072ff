"""Prompt files (JSONL or Parquet); every row is checked before training starts.

One row is one prompt: ``{"messages": [{"role", "content"}, ...]}`` or ``{"prompt": "text"}``, with optional
``"id"``, ``"category"``, ``"branch"`` (a name) and ``"tools"`` (a list of JSON schemas, or that list as a JSON string,
because Parquet cannot hold differing schemas in one column). Other fields (answers, sources) are counted and not read.

Design choice: files are read completely, once, and the run does not start if one row is bad. A row that is silently
dropped would change the data of the experiment, and a bad row that is found at step 90 would cost the run. Memory is
about 1 KB per row in addition to the text. The SHA-256 of the files is kept with the prompts, so that a resumed run can
check that it reads the same data.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_camopd.data.messages import checked_identifier, checked_messages, checked_tools
from megatron_camopd.data.row_files import RowFile, fail, one_line, shown, where
from megatron_camopd.errors import ConfigurationError

_FIELDS = ("id", "category", "branch", "messages", "prompt", "tools")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One checked row of a prompt file; exactly one of ``messages`` and ``text`` is set.

    Attributes:
        id: the row's own id as text, else ``<file name>:<row>``.
        category: the row's category, or None.
        branch: name of the branch that the row belongs to, or None: of every branch that lists the file.
        messages: chat messages with at least ``role`` and ``content``; the last one is not the assistant's.
        text: the plain prompt.
        tools: JSON schemas for the chat template, or None.
        source: the file.
        row: line of a JSONL file or row of a Parquet file, counted from 1.
    """

    id: str
    category: str | None
    branch: str | None
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list[dict[str, Any]] | None
    source: Path
    row: int

    @property
    def where(self) -> str:
        """File and row for error texts: ``<file> line 17`` or ``<file> row 17``."""
        return where(self.source, self.row)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of the files that one flag names, in file order.

    Attributes:
        prompts: at least one prompt.
        sha256: hex digest over the files' SHA-256 digests, in the order given.
        flag: the flag that named the files, for error texts (``--general-prompts``).
        unread: number of rows of the files with each field that is not read.
    """

    prompts: list[Prompt]
    sha256: str
    flag: str
    unread: dict[str, int] = dataclasses.field(default_factory=dict)


def read_prompts(paths: Sequence[str | Path], *, flag: str) -> PromptSet:
    """Read and check all prompts of the files that one flag names.

    Args:
        paths: one or more ``.jsonl`` or ``.parquet`` files, kept in this order.
        flag: the flag that named them; every error text starts with it.

    Returns:
        All prompts of all files, with the SHA-256 of the files.

    Raises:
        ConfigurationError: a file is missing, unreadable, empty or of another kind, or a row is not a prompt. The
            text names flag, file and row.
    """
    assert not isinstance(paths, str), "pass a list of paths"
    if not paths:
        raise ConfigurationError(f"{flag}: no file given; name one or more .jsonl or .parquet files")
    prompts: list[Prompt] = []
    fingerprint, unread = hashlib.sha256(), Counter[str]()
    for path in map(Path, paths):
        try:
            digest, found, not_read = _read_file(path, flag)
        except OSError as error:
            reason = one_line(error.strerror or str(error))
            fail(flag, str(path), f"cannot be read ({reason}); give a readable .jsonl or .parquet file")
        fingerprint.update(digest)
        prompts.extend(found)
        unread += not_read
    return PromptSet(prompts=prompts, sha256=fingerprint.hexdigest(), flag=flag, unread=dict(unread))


def prompts_of_branch(prompts: PromptSet, branch: str, listed_by: Mapping[Path, Sequence[str]]) -> PromptSet:
    """Return the prompts of one branch, out of those of the files that it lists.

    Args:
        prompts: all rows of the branch's files.
        branch: its name; rows that name no branch are among its prompts.
        listed_by: for each file, by its resolved path, the names of the branches that list it.

    Raises:
        ConfigurationError: a row names a branch that does not list its file, or no row is left.
    """
    kept = []
    for prompt in prompts.prompts:
        names = listed_by[prompt.source.resolve()]
        if prompt.branch is not None and prompt.branch not in names:
            known = ", ".join(map(repr, names))
            fail(prompts.flag, prompt.where, f"names the branch {prompt.branch!r}; the file is listed by {known}")
        if prompt.branch in (None, branch):
            kept.append(prompt)
    if not kept:
        raise ConfigurationError(f"{prompts.flag}: no row of these files belongs to the branch {branch!r}")
    return dataclasses.replace(prompts, prompts=kept)


def _read_file(path: Path, flag: str) -> tuple[bytes, list[Prompt], Counter[str]]:
    """Return the SHA-256 of the file's bytes, its prompts, and the number of rows with each field that is not read."""
    file = RowFile(path, flag=flag, columns=_FIELDS, needed=("messages", "prompt"))
    digest = file.sha256()
    prompts = [_prompt_from_row(row, path, number, flag) for number, _, row in file.rows()]
    if not prompts:
        fail(flag, str(path), "is empty; it must hold at least one prompt")
    return digest, prompts, file.unread


def _prompt_from_row(row: Any, path: Path, number: int, flag: str) -> Prompt:
    """Check one row and keep the fields of a prompt."""
    place = where(path, number)
    if not isinstance(row, dict):
        fail(flag, place, f'is {shown(row)}; each row must be an object with "messages" or "prompt"')
    messages, text = row.get("messages"), row.get("prompt")
    if (messages is None) == (text is None):
        found = "both" if messages is not None else f"neither (found: {one_line(', '.join(row)) or 'no fields'})"
        fail(flag, place, f'has {found}; each row needs one of "messages" and "prompt"')
    if text is not None:
        if not isinstance(text, str):
            fail(flag, place, f'has "prompt" {shown(text)}; it must be text (chat messages belong in "messages")')
        if not text.strip():
            fail(flag, place, 'has an empty "prompt"; remove the row or fill it')
    for field in ("category", "branch"):
        if row.get(field) is not None and not isinstance(row[field], str):
            fail(flag, place, f'has "{field}" {shown(row[field])}; it must be text')
    return Prompt(
        id=checked_identifier(row, f"{path.name}:{number}", place, flag),
        category=row.get("category"),
        branch=row.get("branch"),
        messages=None if messages is None else _checked_prompt(messages, place, flag),
        text=text,
        tools=checked_tools(row.get("tools"), place, flag),
        source=path,
        row=number,
    )


def _checked_prompt(messages: Any, place: str, flag: str) -> list[dict[str, Any]]:
    """Check the messages that the student is to answer."""
    checked = checked_messages(messages, place, flag)
    if checked[-1]["role"] == "assistant":
        fail(flag, place, "ends with an assistant message; the student writes that one, so cut it off")
    if not any(message["content"].strip() for message in checked):
        fail(flag, place, "has an empty prompt: no message has text; remove the row or fill it")
    return checked
