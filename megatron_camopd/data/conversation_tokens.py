"""A conversation to token ids, and which of them the assistant wrote, by the chat template of the tokenizer.

The choice made: the template is rendered as text, cut where each assistant turn begins, and the pieces are encoded one
by one. An assistant turn begins where the rendering of the messages before it, generation prompt included, ends: the
very ids that a rollout of that turn starts from, since no token reaches across the cut. It ends with the first
end-of-sequence id after it, which is trained too: the model learns to stop. Line breaks and headers that a template
puts between turns are not trained. A template that renders earlier messages differently once others follow, so that no
such place exists, is refused by name of the row.

Tensor contract: none; ``token_ids`` and ``trained`` are lists of one length, at most ``max_length``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_camopd.data.chat import apply_chat_template
from megatron_camopd.data.conversations import Conversation
from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG_POLICIES = ("truncate-right", "skip")


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids of a conversation; ``trained[t]``: token t is the assistant's, its prediction enters the loss."""

    id: str
    token_ids: list[int]
    trained: list[bool]

    def __len__(self) -> int:
        return len(self.token_ids)


class ConversationFormatter:
    """Encodes conversations with one tokenizer, one set of template variables and one length limit.

    Attributes:
        truncated: whether the last :meth:`encode` cut its conversation.
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
        """Errors: ConfigurationError where the tokenizer has no chat template."""
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                "--load: its tokenizer has no chat template to write conversations with; convert a model that has one"
            )
        assert overlong in OVERLONG_POLICIES, overlong
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs)
        self._ends = frozenset(end_of_sequence_ids)
        self._max_length = max_length
        self._overlong = overlong
        self.truncated = False

    def encode(self, conversation: Conversation) -> EncodedConversation | None:
        """Encode one conversation; None where it is too long (``skip``), or nothing of the assistant's is left.

        Errors: ConfigurationError naming file and row: a template that fails, that cuts no assistant turn out, or that
        ends one without an end-of-sequence id.
        """
        text = self._render(conversation, conversation.messages, generation_prompt=False)
        starts = self._turn_starts(conversation, text)
        pieces = zip([0, *starts], [*starts, len(text)], strict=True)
        encoded = [self._tokenizer.encode(text[start:end], add_special_tokens=False) for start, end in pieces]
        token_ids, trained = list(encoded[0]), [False] * len(encoded[0])
        for piece in encoded[1:]:
            length = next((place + 1 for place, token in enumerate(piece) if token in self._ends), None)
            if length is None:
                raise ConfigurationError(
                    f"{conversation.where}: the chat template ends an assistant turn without an end-of-sequence token; "
                    "the model would not learn to stop"
                )
            token_ids += piece
            trained += [True] * length + [False] * (len(piece) - length)
        self.truncated = len(token_ids) > self._max_length
        if self.truncated and self._overlong == "skip":
            return None
        trained = trained[: self._max_length]
        if not any(trained[1:]):  # nothing predicts the first token
            return None
        return EncodedConversation(conversation.id, token_ids[: self._max_length], trained)

    def _turn_starts(self, conversation: Conversation, text: str) -> list[int]:
        """Where in ``text`` each assistant turn begins."""
        starts = []
        for place, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(conversation, conversation.messages[:place], generation_prompt=True)
            if not text.startswith(before):
                raise ConfigurationError(
                    f"{conversation.where}: the chat template renders what comes before messages[{place}] differently "
                    "once later messages follow, so the assistant's part cannot be told; split the conversation there"
                )
            starts.append(len(before))
        return starts

    def _render(self, conversation: Conversation, messages: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        return apply_chat_template(
            self._tokenizer,
            messages,
            conversation.tools,
            conversation.where,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **self._template_kwargs,
        )
