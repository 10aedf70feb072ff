"""One prompt to token ids, by the chat template of the checkpoint's own tokenizer.

The choice made: the template is the tokenizer's and is never guessed. Plain text becomes one user message when there
is a template, and is encoded as it stands when there is none (a base model). The ids end where the student's answer
begins: the template adds its generation prompt, and an end-of-sequence id that a tokenizer appends to plain text is
taken off again.

A prompt longer than the limit is cut at its left (``truncate-left``: the latest turns and the generation prompt
stay, a system message is the first to go) or left out (``skip``).

Tensor contract: none; ids are a list of Python ints of length 1 to ``max_prompt_length``.
"""

import dataclasses
import inspect
import json
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from megatron_camopd.config.settings import Settings, at_least, setting
from megatron_camopd.data.prompt_files import Prompt
from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG_POLICIES = ("truncate-left", "skip")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSettings(Settings):
    """CaMOPD chat template: of the checkpoint's own tokenizer."""

    chat_template_kwargs: dict[str, Any] = setting({}, kept=True, metavar="JSON", parse=_json_object)
    """arguments of the chat template, e.g. '{"enable_thinking": false}'"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """CaMOPD prompts: how long they may be."""

    max_prompt_length: int = setting(4096, within=at_least(1), kept=True)
    """tokens of a prompt at most"""

    overlong_prompts: Literal["truncate-left", "skip"] = setting("truncate-left", kept=True)
    """what happens to longer prompts"""


class ChatFormatter:
    """Encodes prompts with one tokenizer, one set of template variables and one length limit.

    Attributes:
        truncated: prompts cut so far in this process.
        skipped: prompts left out so far in this process.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template_kwargs: Mapping[str, Any],
        max_prompt_length: int,
        overlong: str = "truncate-left",
    ) -> None:
        """Keep the settings.

        Args:
            tokenizer: a Hugging Face tokenizer.
            template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``.
            max_prompt_length: most tokens a prompt may have, generation prompt included; at least 1.
            overlong: ``truncate-left`` or ``skip``.

        Raises:
            ConfigurationError: a setting is out of range, or a template variable has the name of an argument of
                ``apply_chat_template``, which would change what comes back instead of what is rendered.
        """
        if max_prompt_length < 1:
            raise ConfigurationError(f"--max-prompt-length {max_prompt_length}: must be at least 1 token")
        if overlong not in OVERLONG_POLICIES:
            raise ConfigurationError(f"--overlong-prompts {overlong}: must be one of {', '.join(OVERLONG_POLICIES)}")
        own_arguments = inspect.signature(type(tokenizer).apply_chat_template).parameters
        for name in template_kwargs:
            if name in own_arguments:
                raise ConfigurationError(
                    f"--chat-template-kwargs {name}: is set by this program; give template variables"
                )
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs)
        self._max_prompt_length = max_prompt_length
        self._overlong = overlong
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.truncated = 0
        self.skipped = 0

    def encode(self, prompt: Prompt) -> list[int] | None:
        """Encode one prompt, up to and including the template's generation prompt.

        Args:
            prompt: a checked row.

        Returns:
            1 to ``max_prompt_length`` token ids, or None when the prompt is too long and the policy is ``skip``.

        Raises:
            ConfigurationError: messages or tools without a chat template, a template that fails for this row, or a
                row without tokens; the line names file and row.
        """
        token_ids = self._encode_chat(prompt) if self._has_template else self._encode_plain(prompt)
        if not token_ids:
            raise ConfigurationError(f"{prompt.where}: the prompt encodes to no tokens; remove the row or fill it")
        if len(token_ids) <= self._max_prompt_length:
            return token_ids
        if self._overlong == "skip":
            self.skipped += 1
            return None
        self.truncated += 1
        return token_ids[-self._max_prompt_length :]

    def _encode_chat(self, prompt: Prompt) -> list[int]:
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        token_ids = apply_chat_template(
            self._tokenizer,
            messages,
            prompt.tools,
            prompt.where,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self._template_kwargs,
        )
        return list(token_ids)

    def _encode_plain(self, prompt: Prompt) -> list[int]:
        if prompt.text is None or prompt.tools:
            found = "messages" if prompt.text is None else "tools"
            raise ConfigurationError(
                f'{prompt.where}: has "{found}", but the tokenizer has no chat template; '
                'give one with the checkpoint or use "prompt" text'
            )
        bare = self._tokenizer.encode(prompt.text, add_special_tokens=False)
        if not bare:
            return []
        token_ids = self._tokenizer.encode(prompt.text, add_special_tokens=True)
        end = self._tokenizer.eos_token_id
        if token_ids[-1] == end and token_ids[-len(bare) :] != bare:
            token_ids.pop()
        return token_ids


def apply_chat_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    where: str,
    **options: Any,
) -> Any:
    """What the tokenizer's method of that name returns. Errors: ConfigurationError naming ``where``."""
    try:
        # tools are declared there as an invariant list of more types than we use
        return tokenizer.apply_chat_template(messages, tools=cast(Any, tools), **options)
    except Exception as error:  # a template is a program of the checkpoint's author: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigurationError(
            f"{where}: the tokenizer's chat template fails for this row ({reason}); change the row or the template"
        ) from error
