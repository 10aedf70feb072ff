"""Conversion of one prompt to token ids, with the chat template of the checkpoint's own tokenizer.

Design choice: the chat template always comes from the tokenizer. Plain text becomes one user message if there is a
template, and is encoded unchanged if there is none (a base model). The ids end where the student's response begins: the
template adds its generation prompt, and an end-of-sequence id that a tokenizer appends to plain text is removed.

A prompt that exceeds the length limit is cut on the left (``truncate-left``: the latest turns and the generation prompt
are kept, a system message is the first to be lost) or skipped (``skip``).

Ids are a list of 1 to ``max_prompt_length`` Python ints.
"""

import dataclasses
import inspect
import json
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from jinja2 import TemplateSyntaxError

from megatron_camopd.config.settings import Settings, at_least, setting
from megatron_camopd.data.message_checks import MessageChecks, check_nothing_vanishes
from megatron_camopd.data.prompt_files import Prompt
from megatron_camopd.data.template_reads import template_reads
from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG_POLICIES = ("truncate-left", "skip")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"{text[:160]!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text[:160]!r} is not a JSON object")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSettings(Settings):
    """CaMOPD chat template: the one of the checkpoint's tokenizer."""

    chat_template_kwargs: dict[str, Any] = setting({}, kept=True, metavar="JSON", parse=_json_object)
    """variables for the chat template, e.g. '{"enable_thinking": false}'"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """CaMOPD prompts: how long they may be."""

    max_prompt_length: int = setting(4096, within=at_least(1), kept=True)
    """maximum number of tokens of a prompt"""

    overlong_prompts: Literal["truncate-left", "skip"] = setting("truncate-left", kept=True)
    """handling of longer prompts: cut on the left, or skip"""


class ChatFormatter:
    """Encoder of prompts with one tokenizer, one set of template variables and one length limit.

    Attributes:
        truncated: number of prompts cut so far in this process.
        skipped: number of prompts skipped so far in this process.
        length: number of tokens of the last prompt before it was cut.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template_kwargs: Mapping[str, Any],
        max_prompt_length: int,
        overlong: str = "truncate-left",
    ) -> None:
        """Check and keep the settings.

        Args:
            tokenizer: a Hugging Face tokenizer.
            template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``.
            max_prompt_length: maximum number of tokens of a prompt, generation prompt included; at least 1.
            overlong: ``truncate-left`` or ``skip``.

        Raises:
            ConfigurationError: a setting is out of range, or a template variable would have no effect or another one
                than meant (:func:`check_template_variables`).
        """
        if max_prompt_length < 1:
            raise ConfigurationError(f"--max-prompt-length {max_prompt_length}: must be at least 1 token")
        if overlong not in OVERLONG_POLICIES:
            raise ConfigurationError(f"--overlong-prompts {overlong}: must be one of {', '.join(OVERLONG_POLICIES)}")
        check_template_variables(tokenizer, template_kwargs)
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs)
        self._max_prompt_length = max_prompt_length
        self._overlong = overlong
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._checks = MessageChecks(tokenizer, end_of_sequence_ids=[])
        self.truncated = 0
        self.skipped = 0
        self.length = 0

    def encode(self, prompt: Prompt) -> list[int] | None:
        """Encode one prompt, up to and including the template's generation prompt.

        Args:
            prompt: a checked row.

        Returns:
            1 to ``max_prompt_length`` token ids, or None if the prompt is too long and the policy is ``skip``.

        Raises:
            ConfigurationError: the row has messages or tools but there is no chat template, the template fails for
                this row, or the row encodes to no tokens. The text names file and row.
        """
        token_ids = self._encode_chat(prompt) if self._has_template else self._encode_plain(prompt)
        if not token_ids:
            raise ConfigurationError(f"{prompt.where}: the prompt encodes to no tokens; remove the row or fill it")
        self.length = len(token_ids)
        if self.length <= self._max_prompt_length:
            return token_ids
        if self._overlong == "skip":
            self.skipped += 1
            return None
        self.truncated += 1
        return token_ids[-self._max_prompt_length :]

    def check(self, prompt: Prompt) -> bool:
        """Check that the chat template renders what a prompt says.

        Returns:
            Whether the prompt holds special tokens, which are encoded as such.

        Raises:
            ConfigurationError: the template fails for this row, does not read its tools, or leaves out the content of
                a system or user message. The text names file and row.
        """
        messages = _messages(prompt)
        if self._has_template:
            self._checks.check_tools(prompt.tools, prompt.where)
            options = {"add_generation_prompt": True, "tokenize": False, **self._template_kwargs}
            text = apply_chat_template(self._tokenizer, messages, prompt.tools, prompt.where, **options)
            check_nothing_vanishes(messages, [], text, prompt.where)
        return self._checks.special_token(messages) is not None

    def settings(self) -> dict[str, Any]:
        """Return what decides the result of :meth:`encode` beside tokenizer and row, as JSON values."""
        return {
            "template_kwargs": self._template_kwargs,
            "max_prompt_length": self._max_prompt_length,
            "overlong": self._overlong,
        }

    def _encode_chat(self, prompt: Prompt) -> list[int]:
        messages = _messages(prompt)
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
        token_ids: list[int] = self._tokenizer.encode(prompt.text, add_special_tokens=True)
        end = self._tokenizer.eos_token_id
        if token_ids[-1] == end and token_ids[-len(bare) :] != bare:
            token_ids.pop()
        return token_ids


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    return prompt.messages or [{"role": "user", "content": prompt.text}]


def check_template_variables(tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any]) -> None:
    """Check the variables that ``--chat-template-kwargs`` gives to the tokenizer's chat template.

    Raises:
        ConfigurationError: A variable has the name of an argument of ``apply_chat_template`` and would not reach the
            template, or the template does not read it, or its value is the text "true" or "false", which a
            template takes as true.
    """
    templates = getattr(tokenizer, "chat_template", None) or {}
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    arguments = set(inspect.signature(type(tokenizer).apply_chat_template).parameters) - {"documents"}
    for name, value in variables.items():
        shown = name if name.isidentifier() and len(name) <= 80 else repr(name[:80])
        flag = f"--chat-template-kwargs {shown}"
        if name in arguments | {"messages", "conversations"}:
            raise ConfigurationError(f"{flag}: is set by this program; give template variables")
        if not texts:
            raise ConfigurationError(f"{flag}: has no effect, the tokenizer has no chat template; drop it")
        given = name in ("raise_exception", "strftime_now")  # functions that transformers gives to templates
        if given or not any(template_reads(text).reads_variable(name) for text in texts):
            raise ConfigurationError(
                f"{flag}: the tokenizer's chat template does not read it; drop it, or mend the name"
            )
        if isinstance(value, str) and value.lower() in ("true", "false"):
            raise ConfigurationError(f"{flag}: is the text {value!r}, which counts as true; write {value.lower()}")


def apply_chat_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    where: str,
    /,
    **options: Any,
) -> Any:
    """Call ``tokenizer.apply_chat_template`` with ``options`` and return its result.

    Raises:
        ConfigurationError: the template cannot be parsed, or fails for this row. The text names the row by ``where``.
    """
    try:
        # cast: the declared type of tools is an invariant list of more types than we use
        return tokenizer.apply_chat_template(messages, tools=cast(Any, tools), **options)
    except TemplateSyntaxError as error:
        reason = " ".join(f"line {error.lineno} of the template: {error.message}".split())
        raise ConfigurationError(
            f"{where}: the tokenizer's chat template cannot be parsed ({reason}); mend the template, the row is not at "
            "fault"
        ) from error
    except Exception as error:  # a template is code of the checkpoint's author and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigurationError(
            f"{where}: the tokenizer's chat template fails for this row ({reason}); change the row or the template"
        ) from error
