"""Conversation files (JSONL or Parquet) for supervised fine-tuning; every row is checked before training starts.

One row is one conversation: ``{"messages": [{"role", "content"}, ...]}`` with at least one assistant message, and
optional ``"id"`` and ``"tools"``. An assistant message may have a ``"weight"``: one of 0 is not trained. Fields of a
row that would decide what is trained or rendered elsewhere are refused; other ones are counted and not read. Fields of
a message are for the chat template, see ``message_checks``.

Design choice: JSONL rows are checked once and read again from the file when a step needs them, so a process keeps only
their byte offsets, however long the conversations are. Parquet rows stay in memory. The SHA-256 of the files is
kept, so that a resumed run can check that it reads the same data.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_camopd.data.messages import checked_identifier, checked_messages, checked_tools
from megatron_camopd.data.prompt_files import Prompt
from megatron_camopd.data.row_files import RowFile, fail, one_line, shown
from megatron_camopd.errors import ConfigurationError

_FIELDS = ("id", "messages", "tools")
_WEIGH = 'give its assistant messages a "weight" of 0 or 1'
_REFUSED = {
    **dict.fromkeys(("weight", "weights", "train_on", "train", "loss_mask", "labels"), _WEIGH),
    "chat_template_kwargs": "give --chat-template-kwargs, which hold for all rows",
    "documents": "write them into a message",
    "functions": 'give "tools"',
}
"""Fields of a row that would change what is trained or rendered, with what to do instead."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One checked row of a conversation file.

    Attributes:
        id: the row's own id as text, else ``<file name>:<row>``.
        messages: chat messages with ``role`` and ``content``, at least one of them the assistant's.
        tools: JSON schemas for the chat template, or None.
        where: file and row, for error texts.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str


def answered(prompt: Prompt, answer: str) -> Conversation:
    """Return the conversation of a prompt and the answer of a model to it."""
    asked = prompt.messages or [{"role": "user", "content": prompt.text}]
    return Conversation(prompt.id, [*asked, {"role": "assistant", "content": answer}], prompt.tools, prompt.where)


class ConversationSet:
    """Conversations of the files that one flag names, in file order; indexing reads one, counted from 0.

    Attributes:
        sha256: hex digest over the files' SHA-256 digests, in the order given.
        flag: the flag that named the files, for error texts.
        unread: number of rows with each field that is not read.
    """

    def __init__(self, paths: Sequence[str | Path], *, flag: str, progress: bool = False) -> None:
        """Read and check all files.

        Args:
            paths: one or more ``.jsonl`` or ``.parquet`` files, kept in this order.
            flag: the flag that named them.
            progress: whether to show a progress bar if this takes more than two seconds.

        Raises:
            ConfigurationError: a file or a row is not usable. The text names flag, file and row.
        """
        if not paths:
            raise ConfigurationError(f"{flag}: no file given; name one or more .jsonl or .parquet files")
        self.flag = flag
        self._files = [
            RowFile(Path(path), flag=flag, columns=_FIELDS, needed=("messages",), refused=tuple(_REFUSED))
            for path in paths
        ]
        # For each conversation its file, its row number, and its byte offset (JSONL) or index in _parquet_rows.
        self._file_of, self._numbers, self._offsets = array("H"), array("Q"), array("Q")
        self._parquet_rows: list[Any] = []
        fingerprint = hashlib.sha256()
        for number, file in enumerate(self._files):
            try:
                fingerprint.update(file.sha256())
                self._scan(number, file, progress)
            except OSError as error:
                reason = one_line(error.strerror or str(error))
                fail(flag, str(file.path), f"cannot be read ({reason}); give a readable .jsonl or .parquet file")
        self.sha256 = fingerprint.hexdigest()
        self.unread = dict(sum((file.unread for file in self._files), Counter[str]()))

    def _scan(self, file_number: int, file: RowFile, progress: bool) -> None:
        before = len(self)
        name = file.path.name
        for number, offset, row in tqdm(
            file.rows(), desc=f"checking {name}", unit=" rows", delay=2, disable=not progress
        ):
            _conversation(row, file, number, self.flag)
            if file.path.suffix.lower() == ".parquet":
                offset = len(self._parquet_rows)
                self._parquet_rows.append(row)
            self._file_of.append(file_number)
            self._numbers.append(number)
            self._offsets.append(offset)
        if len(self) == before:
            fail(self.flag, str(file.path), "is empty; it must hold at least one conversation")

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        file, offset = self._files[self._file_of[index]], self._offsets[index]
        row = self._parquet_rows[offset] if file.path.suffix.lower() == ".parquet" else file.row_at(offset)
        return _conversation(row, file, self._numbers[index], self.flag)


def _conversation(row: Any, file: RowFile, number: int, flag: str) -> Conversation:
    """Check one row and keep the fields that training needs."""
    where = file.where(number)
    if not isinstance(row, dict):
        fail(flag, where, f'is {shown(row)}; each row must be an object with "messages"')
    if row.get("messages") is None:
        found = one_line(", ".join(row)) or "no fields"
        fail(flag, where, f'has no "messages" (found: {found}); each row needs a list of role and content')
    for name, instead in _REFUSED.items():
        if row.get(name) not in (None, [], {}, ""):
            fail(flag, where, f'has a "{name}", which this stage does not read; remove it, or {instead}')
    messages = checked_messages(row["messages"], where, flag)
    check_trainable(messages, where, flag)
    identifier = checked_identifier(row, f"{file.path.name}:{number}", where, flag)
    return Conversation(identifier, messages, checked_tools(row.get("tools"), where, flag), where)


def check_trainable(messages: list[dict[str, Any]], where: str, flag: str) -> None:
    """Check the order and the weights of a conversation's messages, and that one of them is to be trained.

    Args:
        messages: messages that ``checked_messages`` has checked one by one.
        where: file and row, for error texts.
        flag: the flag that named the file.

    Raises:
        ConfigurationError: the conversation begins with the assistant, has a weight that is not one, or nothing to
            train. The text names ``flag`` and ``where``.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    _check_weights(messages, where, flag)
    with_text = [answer for answer in answers if answer["content"].strip() or answer.get("tool_calls")]
    if not any(answer.get("weight", 1) for answer in with_text):
        what = "assistant message with text" if answers else "assistant message"
        what += " and a weight of 1" if with_text else ""
        fail(flag, where, f"has no {what}, so nothing to learn from; remove the row")
    if messages[0] is answers[0]:
        fail(flag, where, "begins with an assistant message; put a system or user message before it")


def _check_weights(messages: list[dict[str, Any]], where: str, flag: str) -> None:
    """Check that a weight is 0 or 1 and an assistant message's."""
    for index, message in enumerate(messages):
        if "weight" not in message:
            continue
        weight, place = message["weight"], f"in messages[{index}]"
        if message["role"] != "assistant":
            fail(flag, where, f"has a weight {place}, a {message['role']} message; only assistant messages are trained")
        if not isinstance(weight, int | float) or weight not in (0, 1):
            fail(flag, where, f"has the weight {shown(weight)} {place}; it must be 0 (not trained) or 1")
