"""Which tokens of a conversation are trained: the assistant's and its end of sequence, at the ids of a rollout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.data import ChatFormatter, Conversation, ConversationFormatter, EncodedConversation, Prompt
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

HALF_ENDLESS = PLAIN.replace(
    "{{ message.content }}<|im_end|>", "{{ message.content }}{% if message.role == 'user' %}<|im_end|>{% endif %}"
)


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


def one(encoded: list[EncodedConversation]) -> EncodedConversation:
    (only,) = encoded
    assert only.part == 0
    return only


def test_the_assistant_and_its_end_are_trained() -> None:
    found = one(formatter().encode(conversation(*TURNS)))
    assert (found.token_ids, found.trained) == spelled_out()
    assert sum(found.trained) == len(b"\nyes <ok> ") + 1 + len(b"no") + 1


def rollout_prompt(template: str, turns: Sequence[tuple[str, str]]) -> list[int]:
    """What the rollout engine gets to answer ``turns``."""
    formatter = ChatFormatter(make_tokenizer(chat_template=template), template_kwargs={}, max_prompt_length=1000)
    messages = [{"role": role, "content": text} for role, text in turns]
    return formatter.encode(Prompt("p", None, None, messages, None, None, Path("f.jsonl"), 1)) or []


def test_a_turn_begins_where_its_rollout_would() -> None:
    """The ids before each trained turn are those that ChatFormatter gives the rollout engine."""
    found = one(formatter().encode(conversation(*TURNS[:-1])))
    starts = [place for place in range(1, len(found)) if found.trained[place] and not found.trained[place - 1]]
    assert len(starts) == 2
    for start, place in zip(starts, (2, 4), strict=True):
        assert found.token_ids[:start] == rollout_prompt(PLAIN, TURNS[:place])
    end = make_tokenizer().encode("no<|im_end|>\n")
    assert found.token_ids[starts[1] :] == end
    assert found.trained[starts[1] :] == [True] * (len(end) - 1) + [False]  # the line break is not trained


def test_template_variables_and_tools() -> None:
    plain = one(formatter().encode(conversation(("user", "a"), ("assistant", "b"))))
    tools = one(formatter().encode(conversation(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}])))
    assert len(tools) > len(plain) and sum(tools.trained) == sum(plain.trained) == 2
    # The generation prompt then holds a block that the rendered turn lacks: where it begins cannot be told.
    with pytest.raises(
        ConfigurationError, match=r"file line 1: the chat template renders what comes before messages\[1\]"
    ):
        formatter(template_kwargs={"thinking": False}).encode(conversation(("user", "a"), ("assistant", "b")))


def test_too_long() -> None:
    whole = one(formatter().encode(conversation(*TURNS)))
    for length in range(1, len(whole) + 1):
        cutter, skipper = formatter(max_length=length), formatter(max_length=length, overlong="skip")
        cut, kept = cutter.encode(conversation(*TURNS)), skipper.encode(conversation(*TURNS))
        assert cutter.truncated == (length < len(whole)) and bool(kept) == (length == len(whole))
        assert cutter.longest == skipper.longest == len(whole)
        if any(whole.trained[:length]):
            found = one(cut)
            assert found.token_ids == whole.token_ids[:length] and found.trained == whole.trained[:length]
        else:
            assert cut == []  # nothing of the assistant's is left


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "--load: its tokenizer has no chat template to write conversations with"),
        (REWRITING, "file line 1: the chat template renders what comes before messages[1] differently once that"),
        (ENDLESS, "file line 1: the chat template ends an assistant turn without an end-of-sequence token"),
        # The user's message has an end, but not the assistant's.
        (HALF_ENDLESS, "file line 1: the chat template ends an assistant turn without an end-of-sequence token"),
        (PLAIN.replace("refuse this", "a"), "file line 1: the tokenizer's chat template fails for this row"),
    ],
)
def test_templates_that_do_not_serve(template: str | None, line: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        formatter(template).encode(conversation(("user", "a"), ("assistant", "b"), ("user", "c")))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


# Turns that the template renders differently once others follow ----------------------------------------------------

# As Qwen3's: the reasoning of turns after the last user message alone, given as a field or within the content.
REASONING = (
    "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set content = m.content.split('</think>')[-1] %}"
    "{% set reason = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1]"
    " if '</think>' in m.content else '') %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ reason }}</think>{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Rendered text of the assistant's turn, ends included, for each form in which its reasoning may be given.
SAID = {"plain": "b", "field": "b", "inside": "<think>why</think>b"}


def said(form: str, number: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"{SAID[form]}{number}"}
    return message | ({"reasoning_content": "why"} if form == "field" else {})


def trained_text(sequence: EncodedConversation) -> str:
    kept = [token for token, flag in zip(sequence.token_ids, sequence.trained, strict=True) if flag]
    return str(make_tokenizer().decode(kept))


@pytest.mark.parametrize("form", SAID)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("ends_with_user", [False, True])
def test_each_turn_is_trained_as_the_last_one(form: str, count: int, ends_with_user: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    for number in range(count):
        messages += [{"role": "user", "content": f"u{number}"}, said(form, number)]
    if ends_with_user:
        messages.append({"role": "user", "content": "bye"})
    one_formatter = formatter(REASONING)
    found = one_formatter.encode(Conversation("c", messages, None, "file line 1"))
    assert [sequence.part for sequence in found] == list(range(count)) and {s.id for s in found} == {"c"}
    reason = "" if form == "plain" else "why"
    for number, sequence in enumerate(found):
        assert trained_text(sequence) == f"<think>{reason}</think>b{number}<|im_end|>"
        first = sequence.trained.index(True)
        # What comes before it is what the rollout engine would get: earlier reasoning is not there.
        earlier = [(m["role"], m["content"]) for m in messages[: 2 + 2 * number]]
        assert sequence.token_ids[:first] == rollout_prompt(REASONING, earlier)
        assert sequence.trained.count(True) == len(f"<think>{reason}</think>b{number}") + 1
    assert one_formatter.longest == max(map(len, found))


def test_turns_that_stay_the_same_stay_one_sequence() -> None:
    """A tool's answer does not hide the reasoning before it."""
    call = {"role": "assistant", "content": "<think>why</think>x", "tool_calls": [{"function": {"name": "f"}}]}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "u"},
        call,
        {"role": "tool", "content": "3"},
        said("inside", 0),
    ]
    found = one(
        formatter(REASONING + "{% if messages[0].tool_calls %}{% endif %}").encode(
            Conversation("c", messages, None, "file line 1")
        )
    )
    assert trained_text(found) == "<think>why</think>x<|im_end|><think>why</think>b0<|im_end|>"


def test_split_sequences_are_cut_one_by_one() -> None:
    messages: list[dict[str, Any]] = []
    for number in range(3):
        messages += [{"role": "user", "content": "u" * 30}, said("inside", number)]
    whole = formatter(REASONING).encode(Conversation("c", messages, None, "file line 1"))
    lengths = list(map(len, whole))
    assert lengths == sorted(set(lengths)) and len(lengths) == 3
    cutter = formatter(REASONING, max_length=lengths[1])
    found = cutter.encode(Conversation("c", messages, None, "file line 1"))
    assert [s.token_ids for s in found] == [s.token_ids for s in whole[:2]]  # nothing is left to train of the third
    assert cutter.truncated and cutter.longest == lengths[2]
    assert (
        formatter(REASONING, max_length=lengths[1], overlong="skip").encode(
            Conversation("c", messages, None, "file line 1")
        )
        == []
    )
    assert formatter(REASONING, max_length=30).encode(Conversation("c", messages, None, "file line 1")) == []


@pytest.mark.parametrize("template", [PLAIN, REASONING])
def test_turns_that_are_cut_off_whole_are_counted(template: str) -> None:
    """At every length, those of which no token is left; none of a conversation that is skipped itself."""
    messages: list[dict[str, Any]] = []
    for number in range(4):
        messages += [{"role": "user", "content": "u" * 9}, {"role": "assistant", "content": f"b{number}"}]
    messages[3]["weight"] = 0
    row = Conversation("c", messages, None, "file line 1")
    whole = formatter(template).encode(row)
    assert len(whole) == (1 if template == PLAIN else 3)
    seen = set()
    for length in range(1, max(map(len, whole)) + 2):
        cutter, skipper = (formatter(template, max_length=length, overlong=o) for o in ("truncate-right", "skip"))
        found, kept = cutter.encode(row), skipper.encode(row)
        # Split, each turn is a sequence; else those after the first follow its end.
        left = len(found) + (trained_text(found[0]).count(">b") if found and template == PLAIN else 0)
        assert cutter.turns_dropped == (3 - left if found else 0)
        assert skipper.turns_dropped == 0 and bool(kept) == (length >= max(map(len, whole)))
        seen.add(cutter.turns_dropped)
    assert seen == {0, 1, 2}


# What the data says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "trained"), [
    ((0, 1), "no<|im_end|>"), ((1, 0), "yes<|im_end|>"), ((0.0, True), "no<|im_end|>"), ((False, 1.0), "no<|im_end|>"),
    ((None, 0), "yes<|im_end|>"), ((1, 1), "yes<|im_end|>no<|im_end|>"), ((0, 0), ""),
])  # fmt: skip
def test_a_weight_of_0_is_not_trained(weights: tuple[Any, Any], trained: str) -> None:
    turns = [("user", "a"), ("assistant", "yes"), ("user", "c"), ("assistant", "no")]
    whole = conversation(*turns)
    for message, weight in zip(whole.messages[1::2], weights, strict=True):
        if weight is not None:
            message["weight"] = weight
    plain = formatter().encode(whole)
    assert "".join(map(trained_text, plain)) == trained
    if trained:
        assert plain[0].token_ids == one(formatter().encode(conversation(*turns))).token_ids
    # The template does not see the weight: a message has two fields.
    counting = formatter(PLAIN.replace("{{ message.content }}", "{{ message.content }} {{ message | length }}"))
    assert "".join(map(trained_text, counting.encode(whole))) == trained.replace("<", " 2<")


def refusal(messages: list[dict[str, Any]], template: str = PLAIN, **changes: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        formatter(template, **changes).encode(Conversation("c", messages, None, "file line 7"))
    line = str(caught.value)
    assert line.startswith("file line 7: ") and "\n" not in line
    return line


U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "a<|im_end|>b"}, A], "'<|im_end|>' in the content of messages[0]"),
        ([U, {"role": "assistant", "content": "<|endoftext|>"}], "'<|endoftext|>' in the content of messages[1]"),
        ([{"role": "system", "content": "x<|im_start|>"}, U, A], "'<|im_start|>' in the content of messages[0]"),
        ([U, A, U, A | {"reasoning_content": "<|im_start|>"}],
         "'<|im_start|>' in the reasoning_content of messages[3]"),
        ([U, A | {"tool_calls": [{"function": {"arguments": {"x": ["<|im_end|>"]}}}]}],
         "'<|im_end|>' in the tool_calls of messages[1]"),
        ([U, A, {"role": "tool", "content": "z", "name": "<|im_end|>"}, A], "'<|im_end|>' in the name of messages[2]"),
    ],
)  # fmt: skip
def test_special_tokens_in_texts_are_refused(messages: list[dict[str, Any]], words: str) -> None:
    line = refusal(messages, PLAIN + "{% set read = [messages[0].reasoning_content, messages[0].tool_calls] %}")
    assert f"holds {words}, a special token of the tokenizer, which would be encoded as a control token" in line


def test_the_text_of_an_end_is_special_too() -> None:
    letter = make_tokenizer().encode("Z", add_special_tokens=False)
    messages = [U, {"role": "assistant", "content": "bZ"}]
    assert formatter().encode(Conversation("c", messages, None, "f"))
    assert "holds 'Z' in the content of messages[1]" in refusal(messages, end_of_sequence_ids=[2, *letter])


@pytest.mark.parametrize("key", ["reasoning_content", "thoughts", "loss mask", "content_type", "rol"])
def test_fields_that_the_template_does_not_read(key: str) -> None:
    line = refusal([U, A, U, A | {key: "x"}])
    assert f"has {key!r} in messages[3], which the chat template does not read, so it would have no effect" in line
    messages = [U, A | {key: "b"}]
    one(
        formatter(PLAIN + f"{{% if messages[0][{key!r}] %}}{{% endif %}}").encode(
            Conversation("c", messages, None, "f")
        )
    )


@pytest.mark.parametrize("key", ["message", "if", "add_generation_prompt", "", "user", "endfor", "refuse", "<think>"])
def test_words_of_the_template_are_no_fields(key: str) -> None:
    assert f"has {key!r} in messages[1], which the chat template does not read" in refusal([U, A | {key: "x"}])


@pytest.mark.parametrize("value", [5, 0.5, True, ["x"], {"a": "x"}, []])
@pytest.mark.parametrize("key", ["reasoning_content", "thoughts"])
def test_fields_that_are_read_must_be_text(key: str, value: Any) -> None:
    reading = PLAIN + f"{{% if messages[0][{key!r}] or messages[0].tool_calls or messages[0].name %}}{{% endif %}}"
    assert f"has {key!r} {value!r} in messages[1]; it must be text" in refusal([U, A | {key: value}], reading)
    messages: list[dict[str, Any]] = [U | {"name": 7}, A | {"tool_calls": [{"function": {"name": "f"}}]}]
    one(formatter(reading).encode(Conversation("c", messages, None, "f")))


@pytest.mark.parametrize(("template", "line"), [("{{ oops( }}", 1), ("{{ messages[0].content }}\n\n{% if %}", 3)])
def test_a_template_that_cannot_be_parsed(template: str, line: int) -> None:
    text = refusal([U, A], template)
    assert f"the tokenizer's chat template cannot be parsed (line {line} of the template: " in text
    assert "change the row" not in text


@pytest.mark.parametrize("template", [THINKING, REASONING])
def test_tools_that_the_template_does_not_read(template: str) -> None:
    whole = conversation(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}])
    with pytest.raises(ConfigurationError, match="^file line 1: has 'tools', which the chat template does not read"):
        formatter(template).encode(whole)
    one(formatter("{% if tools %}{% endif %}" + template).encode(whole))


def test_standard_fields_are_counted() -> None:
    messages = [
        U | {"name": "n"}, A | {"id": "1"}, {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"}, A,
    ]  # fmt: skip
    counter = formatter()
    counter.encode(Conversation("c", messages, None, "f"))
    assert counter.unread == {"name": 2, "id": 1, "tool_call_id": 1}
    counter.encode(Conversation("c", [U, A], None, "f"))
    assert counter.unread == {}
    reader = formatter(PLAIN + "{% if messages[0]['name'] %}{% endif %}")
    reader.encode(Conversation("c", messages, None, "f"))
    assert reader.unread == {"id": 1, "tool_call_id": 1}


LAST_SYSTEM = PLAIN.replace(
    "<|im_start|>{{ message.role",
    "{% if message.role == 'system' and not loop.first %}{% continue %}{% endif %}<|im_start|>{{ message.role",
)  # noqa: E501
STRIPS = PLAIN.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] | trim }}")


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (LAST_SYSTEM, [U, {"role": "system", "content": "be kind"}, U, A], "the content of messages[1]"),
        (PLAIN.replace("{%- for message in messages", "{%- for message in messages[1:]"),
         [{"role": "system", "content": "be kind"}, U, A], "the content of messages[0]"),
        (STRIPS, [U, {"role": "assistant", "content": "why</think>b"}], "the content of messages[1]"),
        (REASONING.replace("{{ reason }}", ""), [U, A | {"reasoning_content": "why"}],
         "the reasoning_content of messages[1]"),
        (REASONING.replace("{{ reason }}", ""), [U, A, U, A | {"reasoning_content": "why"}],
         "the reasoning_content of messages[3]"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out(template: str, messages: list[dict[str, Any]], words: str) -> None:
    assert f"the chat template leaves out {words}; change the row" in refusal(messages, template)


def test_what_a_template_may_change() -> None:
    """White space, and the beginning of an answer that its generation prompt holds."""
    messages = [{"role": "user", "content": " a\n\nb "}, {"role": "assistant", "content": " <think>\nwhy</think> c "}]
    one(formatter(STRIPS.replace(".split('</think>')[-1]", "")).encode(Conversation("c", messages, None, "f")))
    opened = PLAIN.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n").replace(
        "{{ message.content }}", "{{ message.content | trim }}"
    )
    found = one(formatter(opened).encode(Conversation("c", messages, None, "f")))
    assert trained_text(found) == "why</think> c<|im_end|>"
