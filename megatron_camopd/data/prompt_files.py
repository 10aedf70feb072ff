"""Read prompt files (JSONL or Parquet) and check every row before training starts.

One row is one prompt: ``{"messages": [{"role", "content"}, ...]}`` or ``{"prompt": "text"}``, with optional
``"id"``, ``"category"`` and ``"tools"`` (a list of JSON schemas, or that list as a JSON string, because Parquet
cannot hold differing schemas in one column). Other fields (answers, sources) are ignored.

The choice made: files are read whole, once, and one bad row stops the start. A row that is silently dropped changes the
data of the experiment, and a bad row that is found at step 90 costs the run. Memory is about 1 KB a row beside the
text itself. The SHA-256 of the files' bytes travels with the prompts, so that a resumed run can tell whether it
still reads the same data.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_camopd.errors import ConfigurationError

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = ("id", "category", "messages", "prompt", "tools")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Prompt:
    """One checked row of a prompt file; exactly one of ``messages`` and ``text`` is set.

    Attributes:
        id: the row's own id as text, else ``<file name>:<row>``.
        category: the row's category, or None.
        messages: chat messages with at least ``role`` and ``content``; the last one is not the assistant's.
        text: the plain prompt.
        tools: JSON schemas for the chat template, or None.
        source: the file.
        row: line of a JSONL file or row of a Parquet file, counted from 1.
    """

    id: str
    category: str | None
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list[dict[str, Any]] | None
    source: Path
    row: int

    @property
    def where(self) -> str:
        """The place to look at, for messages: ``<file> line 17`` or ``<file> row 17``."""
        return _where(self.source, self.row)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one flag, in file order.

    Attributes:
        prompts: at least one prompt.
        sha256: hex digest over the digests of the files' bytes, in the order given.
        flag: the flag that named the files, for messages (``--general-prompts``).
    """

    prompts: list[Prompt]
    sha256: str
    flag: str


def read_prompts(paths: Sequence[str | Path], *, flag: str) -> PromptSet:
    """Read and check all prompts of one flag.

    Args:
        paths: one or more ``.jsonl`` or ``.parquet`` files, kept in this order.
        flag: the flag they came from; every error starts with it.

    Returns:
        All prompts of all files with the files' fingerprint.

    Raises:
        ConfigurationError: a file is missing, unreadable, empty or of another kind, or a row is no prompt. The
            line names flag, file and row.
    """
    assert not isinstance(paths, str), "pass a list of paths"
    if not paths:
        raise ConfigurationError(f"{flag}: no file given; name one or more .jsonl or .parquet files")
    prompts: list[Prompt] = []
    fingerprint = hashlib.sha256()
    for path in map(Path, paths):
        try:
            digest, found = _read_file(path, flag)
        except OSError as error:
            reason = _one_line(error.strerror or str(error))
            _fail(flag, str(path), f"cannot be read ({reason}); give a readable .jsonl or .parquet file")
        fingerprint.update(digest)
        prompts.extend(found)
    return PromptSet(prompts=prompts, sha256=fingerprint.hexdigest(), flag=flag)


def _read_file(path: Path, flag: str) -> tuple[bytes, list[Prompt]]:
    """Return the SHA-256 of the file's bytes and its prompts."""
    if not path.exists():
        _fail(flag, str(path), "does not exist; name a .jsonl or .parquet file")
    read_rows = _READERS.get(path.suffix.lower())
    if read_rows is None:
        _fail(flag, str(path), f"has the extension {path.suffix!r}; prompt files end in .jsonl or .parquet")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    prompts = [_prompt_from_row(row, path, number, flag) for number, row in read_rows(path, flag)]
    if not prompts:
        _fail(flag, str(path), "is empty; it must hold at least one prompt")
    return digest, prompts


def _jsonl_rows(path: Path, flag: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, parsed JSON) for each line that is not blank."""
    # Binary lines end at \n only; text mode would need a decoded file and could not say which line is broken.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if not text:
                    continue
                row = json.loads(text)
                if _SURROGATE_ESCAPE.search(line):
                    # Half a surrogate pair is valid JSON but no text: tokenizers reject it, hours later.
                    json.dumps(row, ensure_ascii=False).encode("utf-8")
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                _fail(flag, _where(path, number), f"is not valid UTF-8 ({error.reason}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                reason = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
                _fail(flag, _where(path, number), f"is not JSON ({reason}); each line must be one JSON object")
            yield number, row


def _parquet_rows(path: Path, flag: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row as a dictionary of the columns we know)."""
    import pyarrow  # imported here: JSONL users need not wait for it
    import pyarrow.parquet

    try:
        # The context manager closes the file however the loop over this generator ends.
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in _FIELDS if name in file.schema_arrow.names]
            if not {"messages", "prompt"} & set(columns):
                found = ", ".join(file.schema_arrow.names) or "none"
                _fail(flag, str(path), f'has the columns {_one_line(found)}; it needs "messages" or "prompt"')
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
                for row in _batch_rows(batch, path, number, flag):
                    number += 1
                    yield number, _without_nulls(row)
    except pyarrow.ArrowException as error:
        _fail(flag, str(path), f"is not a readable Parquet file ({_one_line(str(error))})")


def _batch_rows(batch: Any, path: Path, rows_before: int, flag: str) -> list[dict[str, Any]]:
    """Convert one Arrow batch to dictionaries; on broken UTF-8 find the row that holds it."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for offset in range(batch.num_rows):
            try:
                batch.slice(offset, 1).to_pylist()
            except UnicodeDecodeError as error:
                where = _where(path, rows_before + offset + 1)
                _fail(flag, where, f"is not valid UTF-8 ({error.reason}); write the column as UTF-8 text")
        raise


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def _prompt_from_row(row: Any, path: Path, number: int, flag: str) -> Prompt:
    """Check one row and keep what a prompt needs of it."""
    where = _where(path, number)
    if not isinstance(row, dict):
        _fail(flag, where, f'is {_shown(row)}; each row must be an object with "messages" or "prompt"')
    messages, text = row.get("messages"), row.get("prompt")
    if (messages is None) == (text is None):
        found = "both" if messages is not None else f"neither (found: {_one_line(', '.join(row)) or 'no fields'})"
        _fail(flag, where, f'has {found}; each row needs one of "messages" and "prompt"')
    if text is not None:
        if not isinstance(text, str):
            _fail(flag, where, f'has "prompt" {_shown(text)}; it must be text (chat messages belong in "messages")')
        if not text.strip():
            _fail(flag, where, 'has an empty "prompt"; remove the row or fill it')
    identifier, category = row.get("id"), row.get("category")
    if identifier is not None and (isinstance(identifier, bool) or not isinstance(identifier, str | int)):
        _fail(flag, where, f'has "id" {_shown(identifier)}; it must be text or a whole number')
    if category is not None and not isinstance(category, str):
        _fail(flag, where, f'has "category" {_shown(category)}; it must be text')
    return Prompt(
        id=f"{path.name}:{number}" if identifier is None else str(identifier),
        category=category,
        messages=None if messages is None else _checked_messages(messages, where, flag),
        text=text,
        tools=_checked_tools(row.get("tools"), where, flag),
        source=path,
        row=number,
    )


def _checked_messages(messages: Any, where: str, flag: str) -> list[dict[str, Any]]:
    """Check a conversation's shape and drop null fields, which templates take for set ones."""
    if not isinstance(messages, list):
        _fail(flag, where, f'has "messages" {_shown(messages)}; it must be a list of {{"role", "content"}} objects')
    if not messages:
        _fail(flag, where, 'has empty "messages"; it must hold at least one message')
    checked: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            _fail(flag, where, f'has {name} {_shown(message)}; each message must be a {{"role", "content"}} object')
        kept = {key: value for key, value in message.items() if value is not None}
        role = kept.get("role")
        if role not in ROLES:  # many templates drop an unknown role without a word
            found = "no role" if role is None else f"role {_shown(role)}"
            _fail(flag, where, f"has {found} in {name}; roles are {', '.join(ROLES)}")
        if role == "assistant" and kept.get("tool_calls"):
            kept.setdefault("content", "")
        content = kept.get("content")
        if not isinstance(content, str):
            found = "no content" if content is None else f"content {_shown(content)}"
            _fail(flag, where, f"has {found} in {name}; the content must be text")
        if role == "user" and not content.strip():
            _fail(flag, where, f"has an empty prompt: the user's {name} has no text; remove the row or fill it")
        checked.append(kept)
    if checked[-1]["role"] == "assistant":
        _fail(flag, where, "ends with an assistant message; the student writes that one, so cut it off")
    if not any(message["content"].strip() for message in checked):
        _fail(flag, where, "has an empty prompt: no message has text; remove the row or fill it")
    return checked


def _checked_tools(tools: Any, where: str, flag: str) -> list[dict[str, Any]] | None:
    """Return the tool schemas as a list of objects, or None when there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            _fail(flag, where, f'has "tools" {_shown(tools)}, which is not JSON; it must be a list of objects')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        _fail(flag, where, f'has "tools" {_shown(tools)}; it must be a list of objects')
    return tools or None


def _without_nulls(value: Any) -> Any:
    """Drop null fields at every depth: a Parquet struct has all fields of its column, absent ones read as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _where(path: Path, number: int) -> str:
    return f"{path} {'row' if path.suffix.lower() == '.parquet' else 'line'} {number}"


def _shown(value: Any) -> str:
    """A value as one short line."""
    return _one_line(repr(value), limit=40)


def _one_line(text: str, *, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fail(flag: str, where: str, what: str) -> NoReturn:
    raise ConfigurationError(f"{flag}: {where} {what}") from None
