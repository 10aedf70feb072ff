"""Checks that training on a conversation means what its messages say, given the tokenizer and its chat template.

A text that holds a special token would be encoded as a control token. A field that the template does not read, or a
text that it leaves out, would vanish without a word. Such rows are refused.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_camopd.data.row_files import one_line, shown
from megatron_camopd.data.template_reads import template_reads
from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HONOURED = ("role", "content", "weight")
_STANDARD = ("name", "tool_call_id", "id")
"""Fields that chat files hold as a matter of course, also for templates that have no use for them."""


class MessageChecks:
    """Checks of messages for one tokenizer and its chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end_of_sequence_ids: Sequence[int]) -> None:
        """Read the special tokens and the text of the chat template.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            end_of_sequence_ids: token ids that end an assistant turn.
        """
        added = tokenizer.added_tokens_decoder.values()
        ends = [tokenizer.decode([number]) for number in end_of_sequence_ids if number < len(tokenizer)]
        # An id that is a part of a character has no text of its own.
        texts = {token.content for token in added if token.special} | {text for text in ends if "\ufffd" not in text}
        longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        templates: Any = tokenizer.chat_template
        texts_of_templates = templates.values() if isinstance(templates, dict) else [templates or ""]
        self._templates = [template_reads(template) for template in texts_of_templates]

    def check(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, where: str) -> Counter[str]:
        """Check the texts and the fields of all messages of a conversation.

        Args:
            messages: messages of a checked row.
            tools: its tool schemas, or None.
            where: file and row, for error texts.

        Returns:
            Number of messages with each standard field that the template does not read.

        Raises:
            ConfigurationError: a text holds a special token, or the template does not read the tools, or a field
                that is not a standard one, or a field that it reads is no text. The text names row, message, and
                token or field.
        """
        self.check_tools(tools, where)
        unread: Counter[str] = Counter()
        for index, message in enumerate(messages):
            for key, value in message.items():
                if key in _HONOURED or value == "":
                    pass
                elif any(template.reads_field(key) for template in self._templates):
                    _check_is_text(key, value, index, where)
                elif key in _STANDARD:
                    unread[key] += 1
                else:
                    _fail(where, f"has {one_line(repr(key), limit=80)} in messages[{index}], {_UNREAD}")
                self._check_text(value, f"{key} of messages[{index}]", where)
        return unread

    def check_tools(self, tools: Sequence[Any] | None, where: str) -> None:
        """Check that the template reads the tools of a row, if it has any.

        Raises:
            ConfigurationError: it does not. The text names row and field.
        """
        if tools and not any(template.reads_variable("tools") for template in self._templates):
            _fail(where, f"has 'tools', {_UNREAD}")

    def special_token(self, value: Any) -> str | None:
        """Return the first special token in the texts of ``value``, names of fields included, or None."""
        if self._special is None:
            return None
        matches = map(self._special.search, _texts(value))
        return next((found.group() for found in matches if found), None)

    def _check_text(self, value: Any, place: str, where: str) -> None:
        if (found := self.special_token(value)) is not None:
            _fail(
                where,
                f"holds {found!r} in the {place}, a special token of the tokenizer, which would be encoded "
                "as a control token; remove the row, or write this text in another way",
            )


def _check_is_text(key: str, value: Any, index: int, where: str) -> None:
    """Check that a field that the template reads is text, so that its rendering can be compared.

    Tool calls are objects. Names and ids may be whole numbers, like the id of a row.
    """
    is_number = key in _STANDARD and isinstance(value, int) and not isinstance(value, bool)
    if key != "tool_calls" and not isinstance(value, str) and not is_number:
        _fail(where, f"has {one_line(repr(key), limit=80)} {shown(value)} in messages[{index}]; it must be text")


def check_nothing_vanishes(
    messages: Sequence[Mapping[str, Any]], turns: Sequence[tuple[int, str, str]], text: str, where: str
) -> None:
    """Check that rendered text holds what the messages say; white space is not compared.

    Tool messages and tool calls are not compared, because templates quote them. The text of an assistant turn may begin
    in the generation prompt, as with templates that open the reasoning there.

    Args:
        messages: the messages that were rendered.
        turns: of each trained turn its index among the messages, the text before it, generation prompt included, and
            the text up to its end, which begins with the former.
        text: the rendering of all messages.
        where: file and row, for error texts.

    Raises:
        ConfigurationError: names the message of which something is missing.
    """
    whole = _squeezed(text)
    for index, message in enumerate(messages):
        if message["role"] in ("system", "user") and _squeezed(message["content"]) not in whole:
            _fail(where, f"the chat template leaves out the content of messages[{index}]; {_ADVICE}")
    for index, before, through in turns:
        start, rendered = len(_squeezed(before)), _squeezed(through)
        for key in ("content", "reasoning_content"):
            said = _squeezed(value) if isinstance(value := messages[index].get(key), str) else ""
            if said and rendered.rfind(said) + len(said) <= start:
                _fail(where, f"the chat template leaves out the {key} of messages[{index}]; {_ADVICE}")


_UNREAD = (
    "which the chat template does not read, so it would have no effect; remove it, or use a template that reads it"
)
_ADVICE = "change the row, or use a template that renders it"


def _fail(where: str, problem: str) -> NoReturn:
    raise ConfigurationError(f"{where}: {problem}")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in ``value``, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
