"""Conversion of a conversation to token ids, with a mask of the tokens that the assistant wrote.

Design choice: every assistant turn is trained as the last one of the messages up to it, which is what it was when it
was written. The chat template renders the conversation as text, which is cut where each trained turn begins, and the
pieces are encoded one by one. A turn begins where the rendering of the messages before it, generation prompt included,
ends. No token crosses a cut, so the ids before a turn are those from which a rollout of that turn would start. A turn
ends with its first end-of-sequence id, which is trained too, so that the model learns to stop. Line breaks and headers
that a template puts between turns are not trained.

Many templates render earlier turns differently once others follow, such as without their reasoning. Then the
conversation is split: each trained turn gets a sequence of its own, the messages up to it, in which it alone is
trained. A row for which it cannot be told where a turn begins is refused.

``token_ids`` and ``trained`` are lists of equal length, at most ``max_length``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_camopd.data.chat import apply_chat_template, check_template_variables
from megatron_camopd.data.conversations import Conversation
from megatron_camopd.data.message_checks import MessageChecks, check_nothing_vanishes
from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG_POLICIES = ("truncate-right", "skip")


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids of a conversation, or of one of the sequences into which it is split.

    Attributes:
        id: the row's id.
        token_ids: token ids of all turns.
        trained: for each token whether the assistant wrote it and it is to be learnt, so that its prediction enters the
            loss.
        part: number of the sequence among those of its conversation, from 0.
    """

    id: str
    token_ids: list[int]
    trained: list[bool]
    part: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


class _Turn(NamedTuple):
    """A trained turn: its message, the text before it (generation prompt included), and the text up to its end."""

    place: int
    before: str
    through: str


class _Sequence(NamedTuple):
    """Token ids, their mask, and for each trained turn the place of its first token."""

    token_ids: list[int]
    trained: list[bool]
    starts: list[int]


class ConversationFormatter:
    """Encoder of conversations with one tokenizer, one set of template variables and one length limit.

    Attributes:
        max_length: maximum number of tokens of a sequence.
        overlong: handling of longer ones, ``truncate-right`` or ``skip``.
        truncated: whether the last :meth:`encode` cut its conversation.
        longest: number of tokens of its longest sequence before it was cut.
        turns_dropped: number of its trained turns of which the cut left no token, if it left any of others.
        unread: number of its messages with each standard field that the chat template does not read.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template_kwargs: Mapping[str, Any],
        end_of_sequence_ids: Sequence[int],
        max_length: int,
        overlong: str = "truncate-right",
    ) -> None:
        """Check and keep the settings.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``.
            end_of_sequence_ids: token ids that end an assistant turn.
            max_length: maximum number of tokens of a sequence.
            overlong: ``truncate-right`` or ``skip``.

        Raises:
            ConfigurationError: the tokenizer has no chat template, or one that does not read ``template_kwargs``.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                "--load: its tokenizer has no chat template to write conversations with; convert a model that has one"
            )
        check_template_variables(tokenizer, template_kwargs)
        assert overlong in OVERLONG_POLICIES, overlong
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs)
        self._ends = frozenset(end_of_sequence_ids)
        texts = (tokenizer.decode([number]) for number in self._ends if number < len(tokenizer))
        self._end_texts = [text for text in texts if text]
        self._checks = MessageChecks(tokenizer, end_of_sequence_ids)
        self.max_length = max_length
        self.overlong = overlong
        self.truncated = False
        self.longest = 0
        self.turns_dropped = 0
        self.unread: Counter[str] = Counter()

    def encode(self, conversation: Conversation) -> list[EncodedConversation]:
        """Encode one conversation.

        Returns:
            The conversation as one sequence or, if the template renders earlier turns differently, as one for each
            trained turn. Without those of which truncation leaves no token to train; empty if none is left, or if one
            is too long and the policy is ``skip``.

        Raises:
            ConfigurationError: the template fails, does not read a field of a message or leaves out its text, does not
                show where an assistant turn begins, or ends one without an end-of-sequence id; or a text holds a
                special token. The text names file and row.
        """
        self.unread = self._checks.check(conversation.messages, conversation.tools, conversation.where)
        sequences = self._sequences(conversation)
        self.longest = max(len(sequence.token_ids) for sequence in sequences)
        self.truncated = self.longest > self.max_length
        self.turns_dropped = 0
        if self.truncated and self.overlong == "skip":
            return []
        end = self.max_length
        cut = [_Sequence(ids[:end], trained[:end], starts) for ids, trained, starts in sequences]
        kept = [sequence for sequence in cut if any(sequence.trained[1:])]  # the first is never predicted
        if kept:
            self.turns_dropped = sum(start >= end for sequence in sequences for start in sequence.starts)
        return [
            EncodedConversation(conversation.id, sequence.token_ids, sequence.trained, part)
            for part, sequence in enumerate(kept)
        ]

    def settings(self) -> dict[str, Any]:
        """Return what decides the result of :meth:`encode` beside tokenizer and row, as JSON values."""
        return {
            "template_kwargs": self._template_kwargs,
            "end_of_sequence_ids": sorted(self._ends),
            "max_length": self.max_length,
            "overlong": self.overlong,
        }

    def _sequences(self, conversation: Conversation) -> list[_Sequence]:
        """Return the whole conversation as one sequence, or one of each of its trained turns."""
        where = conversation.where
        given = conversation.messages
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in given]
        weights = [message["role"] == "assistant" and message.get("weight", 1) for message in given]
        text = self._render(conversation, messages, generation_prompt=False)
        turns = [self._turn(conversation, messages, index, text) for index, weight in enumerate(weights) if weight]
        if all(text.startswith(turn.through) for turn in turns):
            check_nothing_vanishes(messages, turns, text, where)
            return [self._encode(text, turns, where)]
        for turn in turns:
            check_nothing_vanishes(messages[: turn.place + 1], [turn], turn.through, where)
        return [self._encode(turn.through, [turn], where) for turn in turns]

    def _turn(self, conversation: Conversation, messages: list[dict[str, Any]], index: int, text: str) -> _Turn:
        before = self._render(conversation, messages[:index], generation_prompt=True)
        through, end = text, index + 1
        if end < len(messages):
            through = self._render(conversation, messages[:end], generation_prompt=False)
        if not through.startswith(before):
            raise ConfigurationError(
                f"{conversation.where}: the chat template renders what comes before messages[{index}] differently once "
                "that message follows, so the assistant's part cannot be told; use other --chat-template-kwargs or "
                "another template, or change the message"
            )
        return _Turn(index, before, through)

    def _encode(self, text: str, turns: Sequence[_Turn], where: str) -> _Sequence:
        """Encode a text in which each of ``turns`` begins where the text before it ends."""
        starts = [len(turn.before) for turn in turns]
        pieces = zip([0, *starts], [*starts, len(text)], strict=True)
        encoded = [self._ids(text[start:end]) for start, end in pieces]
        token_ids, trained, places = list(encoded[0]), [False] * len(encoded[0]), []
        for turn, ids in zip(turns, encoded[1:], strict=True):
            length = next((place + 1 for place, token in enumerate(ids) if token in self._ends), None)
            # The first end in a piece must be the turn's own, not that of a message behind it.
            if length is None or not self._has_end(turn.through[len(turn.before) :]):
                raise ConfigurationError(
                    f"{where}: the chat template ends an assistant turn without an end-of-sequence token; the model "
                    "would not learn to stop"
                )
            places.append(len(token_ids))
            token_ids += ids
            trained += [True] * length + [False] * (len(ids) - length)
        return _Sequence(token_ids, trained, places)

    def _has_end(self, text: str) -> bool:
        return any(end in text for end in self._end_texts) or not self._ends.isdisjoint(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _render(self, conversation: Conversation, messages: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        result: str = apply_chat_template(
            self._tokenizer,
            messages,
            conversation.tools,
            conversation.where,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **self._template_kwargs,
        )
        return result
