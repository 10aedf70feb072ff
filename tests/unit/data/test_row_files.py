"""Rows of files: the same from JSONL and Parquet, from regular files alone, and from files that do not change."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_camopd.data import ChatFormatter, ConversationFormatter, ConversationSet, read_prompts
from megatron_camopd.data.row_files import RowFile
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import make_tokenizer

# It writes out everything that a row holds, so that a null that is left shows in the ids.
TEMPLATE = (
    "{{ tools | tojson }}{% for message in messages %}<|im_start|>{{ message.role }}:{{ message | tojson }}"
    "{% if message.tool_calls %}{{ message.tool_calls[0].function.arguments | tojson }}{% endif %}"
    "{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def user(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def tool_of(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


ROWS: dict[str, list[dict[str, Any]]] = {
    "nested tools": [
        {"messages": [user("a")], "tools": [tool_of(x={"type": "int", "enum": None}, y=None)]},
        {"messages": [user("b")], "tools": [tool_of(x={"type": "str", "enum": ["p"]}, y={"deep": {"er": None}})]},
        {"messages": [user("c")], "tools": None},
    ],
    "arguments": [
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [call(x=1, y=None)]},
                      {"role": "tool", "content": "3", "tool_calls": None}]},
        {"messages": [user("b", tool_calls=None), {"role": "assistant", "content": "c", "tool_calls": [call(y="z")]},
                      {"role": "tool", "content": "", "name": None}]},
    ],
    "lists with null": [
        {"messages": [user("a")], "tools": [tool_of(names=["p", None, "q"])]},
        {"messages": [user("b")], "tools": [tool_of(names=[None], other=[{"x": None, "y": 1}])]},
    ],
    "JSON text": [
        {"prompt": "a", "tools": json.dumps([tool_of(x=None)])},
        {"prompt": "b", "tools": None, "id": None, "category": None},
        {"prompt": None, "messages": [user("c", name=None)], "branch": None},
    ],
}  # fmt: skip


def both(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The rows as JSONL and as Parquet."""
    jsonl, parquet = folder / "rows.jsonl", folder / "rows.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = sorted({name for row in rows for name in row})
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), parquet)
    return [jsonl, parquet]


def prompt_ids(path: Path) -> list[list[int] | None]:
    formatter = ChatFormatter(make_tokenizer(chat_template=TEMPLATE), template_kwargs={}, max_prompt_length=10_000)
    return [formatter.encode(prompt) for prompt in read_prompts([path], flag="--prompts").prompts]


@pytest.mark.parametrize("shape", ROWS)
def test_jsonl_and_parquet_give_the_same_prompts(shape: str, tmp_path: Path) -> None:
    jsonl, parquet = both(tmp_path, ROWS[shape])
    assert prompt_ids(jsonl) == prompt_ids(parquet)
    text = [make_tokenizer().decode(ids or []) for ids in prompt_ids(jsonl)]
    assert len(set(text)) == len(ROWS[shape])
    nulls = sum(part.count("null") for part in text)  # those in lists, those of JSON text, and tools that are not there
    assert nulls == {"nested tools": 1, "arguments": 2, "lists with null": 2, "JSON text": 3}[shape]


@pytest.mark.parametrize("shape", ["nested tools", "arguments", "lists with null"])
def test_jsonl_and_parquet_give_the_same_conversations(shape: str, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "yes", "tool_calls": None}
    rows = [{**row, "messages": [*row["messages"], answer]} for row in ROWS[shape]]
    found = []
    for path in both(tmp_path, rows):
        conversations = ConversationSet([path], flag="--conversations")
        formatter = ConversationFormatter(
            make_tokenizer(chat_template=TEMPLATE), template_kwargs={}, end_of_sequence_ids=[2], max_length=10_000
        )
        encoded = [formatter.encode(conversations[index]) for index in range(len(rows))]
        found.append([(one.token_ids, one.trained) for (one,) in encoded])
        assert [conversations[index].messages[-1] for index in range(len(rows))] == [
            {"role": "assistant", "content": "yes"}
        ] * len(rows)
    assert found[0] == found[1] and len(found[0]) == len(rows)


def read_all(path: Path, kind: str) -> int:
    if kind == "prompts":
        return len(read_prompts([path], flag="--prompts").prompts)
    return len(ConversationSet([path], flag="--prompts"))


def refusal(path: Path, kind: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_all(path, kind)
    line = str(caught.value)
    assert line.startswith("--prompts: ") and "\n" not in line and "\0" not in line and len(line) < 600
    return line


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["prompts", "conversations"])
def test_what_is_no_regular_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    pipe, link, terminal = tmp_path / "pipe.jsonl", tmp_path / "link.parquet", tmp_path / "tty.jsonl"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    terminal.symlink_to("/dev/null")
    for path in (pipe, link, terminal, Path("/dev/zero")):
        assert "is a pipe, a device or a socket, not a regular file" in refusal(path, kind)
    assert "is a folder, not a regular file" in refusal(tmp_path, kind)
    assert "cannot be read (embedded null byte)" in refusal(tmp_path / "a\0b.jsonl", kind)
    assert "is too long for a file name" in refusal(tmp_path / ("a" * 5000 + ".jsonl"), kind)
    assert "is too long for a file name" in refusal(tmp_path / ("b" * 300 + ".parquet"), kind)
    assert "does not exist" in refusal(pipe / "a.jsonl", kind)
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    assert "cannot be read (Too many levels of symbolic links)" in refusal(loop, kind)


LINE = b'{"messages": [{"role": "user", "content": "a"}]}\n'


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(LINE)


def rewrite(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("change", [grow, rewrite, shorten])
def test_a_file_that_changes_while_it_is_read_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    for name, content in (("a.jsonl", LINE * 3), ("b.jsonl", LINE * 100_000)):
        path = tmp_path / name
        path.write_bytes(content)
        file = RowFile(path, flag="--prompts", columns=("messages",), needed=("messages",))
        file.sha256()
        rows = file.rows()
        next(rows)
        change(path)
        with pytest.raises(ConfigurationError, match=r"^--prompts: .*jsonl changed while it was read; give a file"):
            list(rows)
        with pytest.raises(ConfigurationError, match="changed while it was read"):
            file.sha256()


def test_a_growing_file_comes_to_an_end(tmp_path: Path) -> None:
    """Each row that is read adds two, as a program does that writes faster than we read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * 50)
    file = RowFile(path, flag="--prompts", columns=("messages",), needed=("messages",))
    seen = 0
    with pytest.raises(ConfigurationError, match="changed while it was read"):
        for _ in file.rows():
            seen += 1
            grow(path)
            grow(path)
    assert seen == 50


def test_a_deeply_nested_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for depth in (1500, 5000):
        path.write_bytes(LINE + b'{"prompt": "a", "x": ' + b"[" * depth + b"]" * depth + b"}\n")
        assert f"{path} line 2 " in refusal(path, "prompts")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"prompt": "a", "prompt": "b"}', "prompt"),
        ('{"prompt": "a", "id": 1, "id": 1}', "id"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
        ('{"prompt": "a", "other": [{"x": {"y\\u0041": 1, "yA": 2}}]}', "yA"),
        ('{"prompt": "a", "": 1, "": 2}', ""),
    ],
)
def test_a_key_that_is_given_twice(tmp_path: Path, line: str, key: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "b": {"prompt": 1}, "c": {"prompt": 2}}\n' + line + "\n")
    with pytest.raises(ConfigurationError) as caught:
        read_prompts([path], flag="--prompts")
    assert str(caught.value) == f"--prompts: {path} line 2 has the key {key!r} twice in one object; keep one of them"


def test_fields_of_prompts_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "a", "answer": n, "category": "c", "source": None} for n in range(3)] + [{"prompt": "a", "x": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts([path, path], flag="--prompts").unread == {"answer": 6, "x": 2}
