"""From rows to token ids, and the order in which a stream hands them out, resumes and refuses."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from megatron_camopd.data import ChatFormatter, EncodedPrompt, Prompt, PromptStream, read_prompts
from megatron_camopd.data.chat import check_template_variables
from megatron_camopd.errors import ConfigurationError

FLAG = "--domain-prompts"
BYTES_BEFORE = 3  # the special tokens have the first ids


def prompt_of(text: str | None = None, **fields: Any) -> Prompt:
    row: dict[str, Any] = {
        "id": "x",
        "category": None,
        "branch": None,
        "messages": None,
        "tools": None,
        "source": Path("a.jsonl"),
        "row": 9,
    }
    return Prompt(**{**row, "text": text, **fields})


def encoded(formatter: ChatFormatter, prompt: Prompt) -> list[int]:
    token_ids = formatter.encode(prompt)
    assert token_ids is not None
    return token_ids


def formatter_of(tokenizer: Any, *, limit: int = 1000, overlong: str = "truncate-left", **kwargs: Any) -> ChatFormatter:
    return ChatFormatter(tokenizer, template_kwargs=kwargs, max_prompt_length=limit, overlong=overlong)


def stream_of(
    folder: Path, tokenizer: Any, texts: list[str], *, seed: int = 1, name: str = "domain", **settings: Any
) -> PromptStream:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": text, "id": str(i), "category": f"c{i % 2}"} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptStream(read_prompts([path], flag=FLAG), formatter_of(tokenizer, **settings), seed=seed, name=name)


def ids_of(prompts: list[EncodedPrompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


TEN = [f"prompt {i}" for i in range(10)]


# --- rows to token ids ---


def test_text_is_one_user_message(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    ids = formatter_of(tokenizer).encode(prompt_of("Grüezi"))
    assert ids == formatter_of(tokenizer).encode(prompt_of(messages=[{"role": "user", "content": "Grüezi"}]))
    assert tokenizer.decode(ids) == "<|im_start|>user\nGrüezi<|im_end|><|im_start|>assistant"
    assert type(ids) is list and {type(token) for token in ids} == {int}
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2  # special tokens, not their letters


def test_tools_and_template_variables_reach_the_template(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    formatter = formatter_of(tokenizer, thinking=False)
    text = tokenizer.decode(formatter.encode(prompt_of(messages=messages, tools=[{"name": "f"}])))
    assert text == (
        '<|im_start|>tools\n[{"name": "f"}]<|im_end|>\n<|im_start|>system\nS<|im_end|><|im_start|>user\nU<|im_end|>'
        "<|im_start|>assistant<think></think>"
    )


def test_without_a_template_text_stays_text(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    ids = encoded(formatter_of(tokenizer), prompt_of("plain text"))
    assert len(ids) == len("plain text") and min(ids) >= BYTES_BEFORE and tokenizer.decode(ids) == "plain text"
    for fields in ({"messages": [{"role": "user", "content": "a"}]}, {"text": "a", "tools": [{"name": "f"}]}):
        with pytest.raises(
            ConfigurationError, match=r'^a.jsonl line 9: has "(messages|tools)", but .* no chat template'
        ):
            formatter_of(tokenizer).encode(prompt_of(**fields))


def test_an_appended_end_of_sequence_is_taken_off_and_a_start_kept(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    bare = tokenizer.encode("ab")
    assert encoded(formatter_of(tokenizer), prompt_of("ab<|im_end|>")) == [*bare, end]  # the row's own stays
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)]
    )
    assert tokenizer.encode("ab") == [start, *bare, end]
    assert formatter_of(tokenizer).encode(prompt_of("ab")) == [start, *bare]
    assert formatter_of(tokenizer).encode(prompt_of("ab<|im_end|>")) == [start, *bare, end]


@pytest.mark.parametrize("overlong", ["truncate-left", "skip"])
def test_too_long_prompts(tiny_tokenizer: Callable[..., Any], overlong: str) -> None:
    tokenizer = tiny_tokenizer()
    whole = encoded(formatter_of(tokenizer), prompt_of("0123456789"))
    fits = formatter_of(tokenizer, limit=len(whole), overlong=overlong)
    assert fits.encode(prompt_of("0123456789")) == whole and (fits.truncated, fits.skipped) == (0, 0)
    short = formatter_of(tokenizer, limit=len(whole) - 1, overlong=overlong)
    ids = short.encode(prompt_of("0123456789"))
    if overlong == "skip":
        assert ids is None and (short.truncated, short.skipped) == (0, 1)
    else:
        assert ids == whole[1:] and (short.truncated, short.skipped) == (1, 0)


def test_a_template_that_fails_names_the_row(tiny_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^a.jsonl line 9: .*chat template fails .*a row that fails"
    ) as caught:
        formatter_of(tiny_tokenizer()).encode(prompt_of("refuse this"))
    assert "\n" not in str(caught.value)


def test_no_tokens_is_an_error(tiny_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^a.jsonl line 9: the prompt encodes to no tokens"):
        formatter_of(tiny_tokenizer(chat_template="{{ '' }}")).encode(prompt_of("a"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"limit": 0}, "--max-prompt-length 0: must be at least 1"),
        ({"overlong": "drop"}, "--overlong-prompts drop: must be one of truncate-left, skip"),
        ({"messages": 1}, "--chat-template-kwargs messages: is set by this program"),
        ({"where": "x"}, "--chat-template-kwargs where: the tokenizer's chat template does not read it"),
        ({"documents": []}, "--chat-template-kwargs documents: the tokenizer's chat template does not read it"),
        ({"raise_exception": 1}, "--chat-template-kwargs raise_exception: the tokenizer's chat template does not read"),
        ({"a\nb": 1}, "--chat-template-kwargs 'a.*nb': the tokenizer's chat template does not read it"),
        ({"thinkng": False}, "--chat-template-kwargs thinkng: the tokenizer's chat template does not read it"),
        ({"think": False}, "--chat-template-kwargs think: the tokenizer's chat template does not read it"),
        (
            {"thinking": "false"},
            "--chat-template-kwargs thinking: is the text 'false', which counts as true; write false",
        ),
        ({"thinking": "True"}, "--chat-template-kwargs thinking: is the text 'True', which counts as true; write true"),
        ({"return_dict": True}, "--chat-template-kwargs return_dict: is set by this program"),
        ({"tokenize": False}, "--chat-template-kwargs tokenize: is set by this program"),
    ],
)
def test_settings_are_checked(tiny_tokenizer: Callable[..., Any], settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigurationError, match=line):
        formatter_of(tiny_tokenizer(), **settings)


# --- the order ---


def test_every_epoch_is_another_permutation(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    stream = stream_of(tmp_path, tiny_tokenizer(), TEN)
    drawn = stream.next(35)  # three and a half epochs in one call
    epochs = [ids_of(drawn[i : i + 10]) for i in range(0, 30, 10)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(map(str, range(10)))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [prompt.position for prompt in drawn] == list(range(35))
    formatter = formatter_of(tiny_tokenizer())
    for prompt in drawn:
        assert prompt.token_ids == formatter.encode(prompt_of(TEN[int(prompt.id)]))
        assert prompt.category == f"c{int(prompt.id) % 2}"


def test_the_order_is_a_function_of_seed_and_name_alone(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    def order(**settings: Any) -> list[str]:
        return ids_of(stream_of(tmp_path, tiny_tokenizer(), TEN, **settings).next(10))

    def global_state() -> list[int]:
        state: Any = np.random.get_state()
        return state[1].tolist()

    np.random.seed(0)
    state_before = global_state()
    reference = order()
    assert global_state() == state_before
    np.random.seed(99)
    assert order() == reference
    others = [order(seed=2), order(name="general"), order(seed=-1), order(seed=2**80)]
    assert len({tuple(other) for other in [reference, *others]}) == 5
    # Pinned: a run must resume in the same order under a later release of this package or of NumPy.
    assert "".join(reference) == "0891357264"


def test_each_row_comes_first_equally_often(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    stream = stream_of(tmp_path, tiny_tokenizer(), ["a", "b", "c", "d"])
    firsts = Counter(ids_of(stream.next(4))[0] for _ in range(800))
    # Binomial(800, 1/4): mean 200, standard deviation 12.2; five of them.
    assert len(firsts) == 4 and all(abs(count - 200) < 62 for count in firsts.values())


def test_batches_of_any_size_draw_the_same_sequence(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    whole = stream_of(tmp_path, tiny_tokenizer(), TEN).next(48)
    stream = stream_of(tmp_path, tiny_tokenizer(), TEN)
    assert [prompt for count in (1, 9, 10, 25, 3) for prompt in stream.next(count)] == whole


# --- too long rows ---


def test_skipped_rows_are_passed_over_and_counted(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    texts = [text + "long" * 20 * (i in (2, 5, 6)) for i, text in enumerate(TEN)]
    stream = stream_of(tmp_path, tiny_tokenizer(), texts, limit=60, overlong="skip")
    everything = stream_of(tmp_path, tiny_tokenizer(), texts).next(30)
    expected = [(p.id, p.position) for p in everything if p.id not in ("2", "5", "6")]
    drawn = stream.next(21)
    assert [(p.id, p.position) for p in drawn] == expected
    assert stream.skipped == drawn[-1].position + 1 - 21


def test_a_stream_without_a_short_prompt_is_an_error(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    stream = stream_of(tmp_path, tiny_tokenizer(), TEN, limit=5, overlong="skip")
    with pytest.raises(
        ConfigurationError, match=r"^--domain-prompts: all 10 prompts are longer than --max-prompt-length"
    ):
        stream.next(1)
    one = stream_of(tmp_path, tiny_tokenizer(), [*["long" * 20] * 9, "a"], limit=60, overlong="skip")
    assert ids_of(one.next(3)) == ["9"] * 3  # one short prompt is enough


def test_a_row_that_cannot_be_encoded_names_flag_file_and_row(
    tmp_path: Path, tiny_tokenizer: Callable[..., Any]
) -> None:
    stream = stream_of(tmp_path, tiny_tokenizer(), ["fine", "refuse this"])
    with pytest.raises(ConfigurationError, match=r"^--domain-prompts: .*prompts.jsonl line 2: .*template fails"):
        stream.next(2)


# --- resuming ---


@pytest.mark.parametrize("overlong", ["truncate-left", "skip"])
@pytest.mark.parametrize("before", [0, 1, 10, 13, 40])
def test_resuming_continues_with_the_very_next_prompt(
    tmp_path: Path, tiny_tokenizer: Callable[..., Any], before: int, overlong: str
) -> None:
    def stream() -> PromptStream:
        texts = [*TEN[:8], "long" * 20, "long" * 20]
        return stream_of(tmp_path, tiny_tokenizer(), texts, limit=60, overlong=overlong)

    straight, stopped, resumed = stream(), stream(), stream()
    expected = straight.next(before + 20)[before:] if before else straight.next(20)
    if before:
        stopped.next(before)
    resumed.next(3)  # where it stood before must not matter
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.state_dict() == stopped.state_dict()
    assert resumed.next(20) == expected
    assert resumed.state_dict() == straight.state_dict() and resumed.skipped == straight.skipped


def test_the_state_says_where_in_which_files(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    stream = stream_of(tmp_path, tiny_tokenizer(), TEN)
    stream.next(23)
    state = stream.state_dict()
    assert len(str(state.pop("sha256"))) == 64
    assert state == {"name": "domain", "seed": 1, "epoch": 2, "position": 3, "skipped": 0, "truncated": 0, "count": 10}


def test_a_state_of_something_else_is_refused(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    state = stream_of(tmp_path, tiny_tokenizer(), TEN).state_dict()

    def refusal(found: dict[str, Any], **settings: Any) -> str:
        texts = settings.pop("texts", TEN)
        stream = stream_of(tmp_path, tiny_tokenizer(), texts, **settings)
        stream.next(4)
        before = stream.state_dict()
        with pytest.raises(ConfigurationError) as caught:
            stream.load_state_dict(found)
        assert stream.state_dict() == before and "\n" not in str(caught.value)
        return str(caught.value)

    assert refusal(state, texts=TEN[:9]).startswith("--domain-prompts: the files hold 9 prompts")
    same_count = refusal(state, texts=[*TEN[:9], "another"])
    assert "hold 10 prompts" in same_count and str(state["sha256"])[:12] in same_count
    assert refusal(state, seed=2).startswith("--seed 2: the checkpoint's prompts were in the order of seed 1")
    assert "is of stream 'domain', not 'general'" in refusal(state, name="general")
    for key in state:
        assert f'no valid "{key}"' in refusal({k: v for k, v in state.items() if k != key})
        assert f'no valid "{key}"' in refusal({**state, key: 1.5})
    for key, value in (("epoch", -1), ("position", 10), ("position", -1), ("skipped", -1)):
        assert "is out of range for 10 prompts" in refusal({**state, key: value})


@pytest.mark.parametrize(
    ("template", "read", "unread"),
    [
        ("{% if mood %}{{ messages[0].content }}{% endif %}", ["mood"], ["moo", "content"]),
        ("{% generation %}{{ a }}{# b #} c {% set d = 1 %}{% endgeneration %}", ["a"], ["b", "c", "d"]),
        ("{% macro m(x) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}", ["y"], ["x", "m"]),
        ("{% for i in z %}{% break %}{% endfor %}", ["z"], ["i"]),
        ("{{ documents }}{{ where }}{{ options }}", ["documents", "where", "options"], ["document"]),
        ("{% unknown %}", ["anything"], []),
        ({"default": "{{ a }}", "tool_use": "{{ b }}"}, ["a", "b"], ["c"]),
        (None, [], ["a"]),
    ],
)
def test_which_variables_a_template_reads(
    template: Any, read: list[str], unread: list[str], tiny_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    check_template_variables(tokenizer, dict.fromkeys(read, 1))
    for name in unread:
        with pytest.raises(ConfigurationError, match=f"^--chat-template-kwargs {name}: "):
            check_template_variables(tokenizer, {name: 1})


def test_variables_reach_the_template(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ where }}{{ tokenizer }}{{ documents[0].text }}"
    words = {"where": "b", "tokenizer": "c", "documents": [{"text": "d"}]}
    formatter = ChatFormatter(tokenizer, template_kwargs=words, max_prompt_length=99)
    assert formatter.encode(prompt_of("a")) == tokenizer.encode("abcd", add_special_tokens=False)
