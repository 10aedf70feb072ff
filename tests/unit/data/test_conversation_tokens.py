"""Which tokens of a conversation are trained: the assistant's and its end of sequence, at the ids of a rollout."""

from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.data import ChatFormatter, Conversation, ConversationFormatter, Prompt
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import CHATML, make_tokenizer

# CHATML with the line breaks that its blocks swallow.
PLAIN = CHATML.replace("{%- if thinking is", "{% if thinking is").replace("{%- endfor", "{% endfor")
# What Qwen3's hybrid models do: no thinking in earlier turns, an empty block in the last one.
THINKING = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = "{{ messages | length }}" + PLAIN
ENDLESS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501


def formatter(template: str | None = PLAIN, **changes: Any) -> ConversationFormatter:
    settings: dict[str, Any] = {"template_kwargs": {}, "end_of_sequence_ids": [2], "max_length": 1000}
    return ConversationFormatter(make_tokenizer(chat_template=template), **(settings | changes))


def conversation(*turns: tuple[str, str], tools: Any = None) -> Conversation:
    return Conversation("c", [{"role": role, "content": text} for role, text in turns], tools, "file line 1")


TURNS = (("system", "be\n"), ("user", "hé?"), ("assistant", "\nyes <ok> "), ("user", "more"), ("assistant", "no"),
         ("user", "last"))  # fmt: skip


def spelled_out() -> tuple[list[int], list[bool]]:
    """Ids and mask of TURNS, written down piece by piece."""
    tokenizer = make_tokenizer()
    ids: list[int] = []
    trained: list[bool] = []

    def add(text: str, is_trained: bool) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(piece)
        trained.extend([is_trained] * len(piece))

    for role, text in TURNS:
        add(f"<|im_start|>{role}\n", False)
        add(f"{text}<|im_end|>", role == "assistant")
        add("\n", False)
    return ids, trained


@pytest.mark.parametrize("template", [PLAIN, THINKING], ids=["plain", "thinking"])
def test_the_assistant_and_its_end_are_trained(template: str) -> None:
    found = formatter(template).encode(conversation(*TURNS))
    assert found is not None
    # TURNS end with a user's message: no turn is the last one, and the thinking template adds nothing.
    assert (found.token_ids, found.trained) == spelled_out()
    assert sum(found.trained) == len(b"\nyes <ok> ") + 1 + len(b"no") + 1


@pytest.mark.parametrize("template", [PLAIN, THINKING], ids=["plain", "thinking"])
def test_a_turn_begins_where_its_rollout_would(template: str) -> None:
    """The ids before each trained turn are those that ChatFormatter gives the rollout engine."""
    tokenizer = make_tokenizer(chat_template=template)
    prompts = ChatFormatter(tokenizer, template_kwargs={}, max_prompt_length=1000)
    turns = TURNS[:-1]
    found = formatter(template).encode(conversation(*turns))
    assert found is not None
    starts = [place for place in range(1, len(found)) if found.trained[place] and not found.trained[place - 1]]
    assert len(starts) == 2
    for start, place in zip(starts, (2, 4), strict=True):
        messages = [{"role": role, "content": text} for role, text in turns[:place]]
        prompt = Prompt("p", None, None, messages, None, None, Path("f.jsonl"), 1)
        assert found.token_ids[:start] == prompts.encode(prompt)
    end = tokenizer.encode("<think>\n\n</think>\n\nno<|im_end|>\n" if template == THINKING else "no<|im_end|>\n")
    assert found.token_ids[starts[1] :] == end
    assert found.trained[starts[1] :] == [True] * (len(end) - 1) + [False]  # the line break is not trained


def test_template_variables_and_tools() -> None:
    plain = formatter().encode(conversation(("user", "a"), ("assistant", "b")))
    tools = formatter().encode(conversation(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}]))
    assert plain and tools and len(tools) > len(plain) and sum(tools.trained) == sum(plain.trained) == 2
    # The generation prompt then holds a block that the rendered turn lacks: where it begins cannot be told.
    with pytest.raises(
        ConfigurationError, match=r"file line 1: the chat template renders what comes before messages\[1\]"
    ):
        formatter(template_kwargs={"thinking": False}).encode(conversation(("user", "a"), ("assistant", "b")))


def test_too_long() -> None:
    whole = formatter().encode(conversation(*TURNS))
    assert whole is not None
    for length in range(1, len(whole) + 1):
        cutter, skipper = formatter(max_length=length), formatter(max_length=length, overlong="skip")
        cut, kept = cutter.encode(conversation(*TURNS)), skipper.encode(conversation(*TURNS))
        assert cutter.truncated == (length < len(whole)) and (kept is not None) == (length == len(whole))
        if any(whole.trained[:length]):
            assert cut and cut.token_ids == whole.token_ids[:length] and cut.trained == whole.trained[:length]
        else:
            assert cut is None  # nothing of the assistant's is left


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "--load: its tokenizer has no chat template to write conversations with"),
        (REWRITING, "file line 1: the chat template renders what comes before messages[1] differently once later"),
        (ENDLESS, "file line 1: the chat template ends an assistant turn without an end-of-sequence token"),
        (PLAIN.replace("refuse this", "a"), "file line 1: the tokenizer's chat template fails for this row"),
    ],
)
def test_templates_that_do_not_serve(template: str | None, line: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        formatter(template).encode(conversation(("user", "a"), ("assistant", "b")))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
