"""Check that the chat template ends the assistant's turn with a token at which a response ends.

The end-of-sequence ids come from one file of the model, the chat template from another. If they do not fit, no response
ends before the length limit, and fine-tuning on the template's turns teaches an end that decoding does not know.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_camopd.data.chat import apply_chat_template, check_template_variables
from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "Good morning."
_EXCHANGE = [{"role": "user", "content": "Say good morning."}, {"role": "assistant", "content": _ANSWER}]
_SHOWN_IDS = 8


def check_end_of_sequence(
    tokenizer: "PreTrainedTokenizerBase",
    end_of_sequence_ids: Sequence[int],
    *,
    source: str,
    template_kwargs: Mapping[str, Any],
) -> None:
    """Render a short exchange and check that an end-of-sequence id follows the assistant's words.

    Nothing is checked without a chat template, or if the template refuses the exchange or changes its words; the rows
    then show whether the template serves.

    Args:
        tokenizer: a Hugging Face tokenizer.
        end_of_sequence_ids: token ids that end a response.
        source: the file that names these ids, for the error text.
        template_kwargs: variables for the chat template.

    Raises:
        ConfigurationError: none of the ids is among the tokens after the assistant's words, or a template variable is
            not one of the template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    check_template_variables(tokenizer, template_kwargs)
    try:
        text: str = apply_chat_template(
            tokenizer, _EXCHANGE, None, source, add_generation_prompt=False, tokenize=False, **template_kwargs
        )
    except ConfigurationError:
        return
    _, found, after = text.rpartition(_ANSWER)
    if not found or set(tokenizer.encode(after, add_special_tokens=False)) & set(end_of_sequence_ids):
        return
    written = f"writes {after[:80]!r}" if after else "writes nothing"
    raise ConfigurationError(
        f"{source}: eos_token_id names {named_ids(tokenizer, end_of_sequence_ids)}, but the chat template {written} "
        "after the assistant's turn, so responses would not end; name the token that ends a turn there"
    )


def named_ids(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Return token ids with their tokens as words of a line: ``96 ('<|endoftext|>'), 98 ('<|im_end|>')``."""
    tokens = [(number, tokenizer.convert_ids_to_tokens(number)) for number in ids[:_SHOWN_IDS]]
    shown = ", ".join(f"{number} ({token!r})" if token else f"{number} (no token)" for number, token in tokens)
    return shown if len(ids) <= _SHOWN_IDS else f"{shown} and {len(ids) - _SHOWN_IDS} more"
