"""Conversion of a conversation to token ids, with a mask of the tokens that the assistant wrote.

Design choice: the chat template renders the conversation as text, which is cut where each assistant turn begins, and
the pieces are encoded one by one. An assistant turn begins where the rendering of the messages before it, generation
prompt included, ends. No token crosses a cut, so the ids before a turn are those from which a rollout of that turn
would start. A turn ends with its first end-of-sequence id, which is trained too, so that the model learns to stop. Line
breaks and headers that a template puts between turns are not trained. Some templates render earlier messages
differently once others follow. A row for which that hides where a turn begins is refused.

``token_ids`` and ``trained`` are lists of equal length, at most ``max_length``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_camopd.data.chat import apply_chat_template, check_template_variables
from megatron_camopd.data.conversations import Conversation
from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG_POLICIES = ("truncate-right", "skip")


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids of a conversation.

    Attributes:
        id: the row's id.
        token_ids: token ids of all turns.
        trained: for each token whether the assistant wrote it, so that its prediction enters the loss.
    """

    id: str
    token_ids: list[int]
    trained: list[bool]

    def __len__(self) -> int:
        return len(self.token_ids)


class ConversationFormatter:
    """Encoder of conversations with one tokenizer, one set of template variables and one length limit.

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
        """Check and keep the settings.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``.
            end_of_sequence_ids: token ids that end an assistant turn.
            max_length: maximum number of tokens of a conversation.
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
        self._max_length = max_length
        self._overlong = overlong
        self.truncated = False

    def encode(self, conversation: Conversation) -> EncodedConversation | None:
        """Encode one conversation.

        Returns:
            The encoded conversation, or None if it is too long and the policy is ``skip``, or if truncation leaves no
            token to train.

        Raises:
            ConfigurationError: the template fails, it does not show where an assistant turn begins, or it ends one
                without an end-of-sequence id. The text names file and row.
        """
        text = self._render(conversation, conversation.messages, generation_prompt=False)
        starts = self._turn_starts(conversation, text)
        pieces = zip([0, *starts], [*starts, len(text)], strict=True)
        encoded = [self._tokenizer.encode(text[start:end], add_special_tokens=False) for start, end in pieces]
        token_ids, trained = list(encoded[0]), [False] * len(encoded[0])
        for piece in encoded[1:]:
            length = next((index + 1 for index, token in enumerate(piece) if token in self._ends), None)
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
        if not any(trained[1:]):  # the first token is never predicted
            return None
        return EncodedConversation(conversation.id, token_ids[: self._max_length], trained)

    def _turn_starts(self, conversation: Conversation, text: str) -> list[int]:
        """Return the character offset in ``text`` at which each assistant turn begins."""
        starts = []
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(conversation, conversation.messages[:index], generation_prompt=True)
            if not text.startswith(before):
                raise ConfigurationError(
                    f"{conversation.where}: the chat template renders what comes before messages[{index}] differently "
                    "once later messages follow, so the assistant's part cannot be told; split the conversation there"
                )
            starts.append(len(before))
        return starts

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
