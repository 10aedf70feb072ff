"""Prompt files: both formats give the same prompts, and every bad row is named in one line."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_camopd.data import Prompt, read_prompts
from megatron_camopd.errors import ConfigurationError

FLAG = "--general-prompts"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "Why is the sky blue?", "id": "sky", "category": "stem"},
    {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Zürich 東京\u2028?"}],
        "id": 7,
    },
    {"messages": [{"role": "user", "content": "Weather?"}], "tools": TOOLS},
]


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def error_of(*paths: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_prompts(list(paths), flag=FLAG)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{FLAG}: ")
    return line


def without_source(prompt: Prompt) -> tuple[Any, ...]:
    return prompt.id, prompt.category, prompt.messages, prompt.text, prompt.tools


def test_jsonl_keeps_every_field_and_counts_lines_from_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path.write_bytes(
        b"\xef\xbb\xbf" + text.replace("\n", "\r\n\n", 1).encode()
    )  # byte order mark, a blank line, no last \n
    first, second, third = read_prompts([path], flag=FLAG).prompts
    assert without_source(first) == ("sky", "stem", None, "Why is the sky blue?", None)
    assert without_source(second) == ("7", None, ROWS[1]["messages"], None, None)
    assert without_source(third) == ("a.jsonl:4", None, ROWS[2]["messages"], None, TOOLS)
    assert [first.where, second.where] == [f"{path} line 1", f"{path} line 3"]


def test_parquet_gives_the_same_prompts_as_jsonl(tmp_path: Path) -> None:
    rows = [{"id": f"row{i}", "category": None, **row, "answer": 42} for i, row in enumerate(ROWS)]
    rows = [{**row, "id": f"row{i}"} for i, row in enumerate(rows)]
    jsonl = write_lines(tmp_path / "a.jsonl", *rows)
    # Parquet has one type a column: differing tool schemas are stored as JSON text, absent fields as nulls.
    columns = [{**row, "tools": json.dumps(row["tools"]) if "tools" in row else None} for row in rows]
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    schema = pa.schema(
        [(name, pa.string()) for name in ("id", "category", "prompt", "tools")]
        + [("messages", pa.list_(message)), ("answer", pa.int64())]
    )
    parquet = tmp_path / "a.PARQUET"
    pq.write_table(pa.Table.from_pylist(columns, schema=schema), parquet)
    from_parquet = read_prompts([parquet], flag=FLAG).prompts
    assert [*map(without_source, from_parquet)] == [*map(without_source, read_prompts([jsonl], flag=FLAG).prompts)]
    assert from_parquet[2].where == f"{parquet} row 3"


def test_nested_parquet_tools_lose_the_nulls_of_other_rows(tmp_path: Path) -> None:
    schemas = [[{"name": "f", "parameters": {"x": "int"}}], [{"name": "g", "parameters": {"y": "str"}}]]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "tools": tools} for tools in schemas]), path)
    assert [prompt.tools for prompt in read_prompts([path], flag=FLAG).prompts] == schemas


def test_several_files_are_joined_in_the_order_given(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "two"})
    b = write_lines(tmp_path / "b.jsonl", {"prompt": "three"})
    forward, backward = read_prompts([a, b], flag=FLAG), read_prompts([str(b), str(a)], flag=FLAG)
    assert [prompt.text for prompt in forward.prompts] == ["one", "two", "three"]
    assert [prompt.id for prompt in backward.prompts] == ["b.jsonl:1", "a.jsonl:1", "a.jsonl:2"]
    digests = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in (a, b))
    assert forward.sha256 == hashlib.sha256(digests).hexdigest() != backward.sha256


def test_null_fields_and_tool_calls_without_content(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    row = {
        "prompt": None,
        "tools": [],
        "messages": [
            {"role": "user", "content": "Weather?", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": ""},
        ],
    }
    (prompt,) = read_prompts([write_lines(tmp_path / "a.jsonl", row)], flag=FLAG).prompts
    assert prompt.tools is None
    assert prompt.messages == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": ""},
    ]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (b'{"prompt": "cut', r"is not JSON \(column 12: Unterminated string starting at\)"),
        (b"1" * 5000, "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"prompt": "\xff\xfe"}', r"is not valid UTF-8 \(invalid start byte\)"),
        (b'{"prompt": "half \\ud83d"}', r"is not valid UTF-8 \(surrogates not allowed\)"),
        (["a"], r"is \['a'\]; each row must be an object"),
        (None, "is None; each row must be an object"),
        ({"question": "?", "id": 1}, r"has neither \(found: question, id\)"),
        ({}, r"has neither \(found: no fields\)"),
        ({"prompt": "a", "messages": [user("a")]}, "has both"),
        ({"prompt": " \n"}, 'has an empty "prompt"'),
        ({"prompt": [user("a")]}, 'has "prompt" .*must be text'),
        ({"prompt": "a", "id": 1.5}, 'has "id" 1.5'),
        ({"prompt": "a", "id": True}, 'has "id" True'),
        ({"prompt": "a", "category": 3}, 'has "category" 3'),
        ({"prompt": "a", "tools": {"name": "f"}}, 'has "tools" .*must be a list of objects'),
        ({"prompt": "a", "tools": ["f"]}, 'has "tools" .*must be a list of objects'),
        ({"prompt": "a", "tools": "[{"}, 'has "tools" .*not JSON'),
        ({"messages": "hello"}, "has \"messages\" 'hello'; it must be a list"),
        ({"messages": []}, 'has empty "messages"'),
        ({"messages": ["hello"]}, r"has messages\[0\] 'hello'"),
        ({"messages": [{"content": "a"}]}, r"has no role in messages\[0\]"),
        (
            {"messages": [{"role": "human", "content": "a"}]},
            r"has role 'human' in messages\[0\]; roles are system, user",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"has role \['user'\]"),
        ({"messages": [user("a"), {"role": "user"}]}, r"has no content in messages\[1\]"),
        ({"messages": [user([{"type": "text", "text": "a"}])]}, r"has content .* in messages\[0\]"),
        ({"messages": [user("")]}, r"has an empty prompt: the user's messages\[0\]"),
        ({"messages": [{"role": "system", "content": " "}]}, "has an empty prompt: no message has text"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "ends with an assistant message"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, found: str) -> None:
    good = [{"prompt": "fine"}] * 16
    path = write_lines(tmp_path / "a.jsonl", *good, row, *good)
    assert re.search(found, line := error_of(path)), line
    assert line.startswith(f"{FLAG}: {path} line 17 ") and len(line) < len(str(path)) + 300


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.jsonl'} does not exist" in error_of(tmp_path / "none.jsonl")
    assert "is empty; it must hold" in error_of(write_lines(tmp_path / "empty.jsonl"))
    assert "is empty; it must hold" in error_of(write_lines(tmp_path / "blank.jsonl", b"", b" "))
    assert "has the extension '.json'; expected" in error_of(write_lines(tmp_path / "a.json", {"prompt": "a"}))
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder, not a regular file" in error_of(tmp_path / "folder.jsonl")
    with pytest.raises(ConfigurationError, match="no file given"):
        read_prompts([], flag=FLAG)
    # A good file before the bad one changes nothing.
    good = write_lines(tmp_path / "good.jsonl", {"prompt": "a"})
    assert "b.jsonl line 1 is not JSON" in error_of(good, write_lines(tmp_path / "b.jsonl", b"nonsense"))


def test_a_bad_parquet_file_is_named(tmp_path: Path) -> None:
    assert "is not a readable Parquet file" in error_of(write_lines(tmp_path / "text.parquet", {"prompt": "a"}))
    columns, none, bad = (tmp_path / f"{name}.parquet" for name in ("columns", "none", "bad"))
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), columns)
    assert 'has the columns question, answer; it needs "messages" or "prompt"' in error_of(columns)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), none)
    assert "is empty" in error_of(none)
    pq.write_table(pa.table({"prompt": ["a"] * 2000 + [None]}), bad)
    assert f"{bad} row 2001 has neither" in error_of(bad)


def test_broken_utf8_in_parquet_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    count = 1500
    offsets = pa.array([2 * i for i in range(count + 1)], pa.int32()).buffers()[1]
    letters = b"ok" * (count - 1) + b"\xff\xfe"
    pq.write_table(pa.table({"prompt": pa.StringArray.from_buffers(count, offsets, pa.py_buffer(letters))}), path)
    assert f"{path} row 1500 is not valid UTF-8" in error_of(path)


def test_the_room_is_pure_and_light() -> None:
    heavy = "{'torch', 'megatron', 'transformers', 'pyarrow'}"
    code = f"import sys, megatron_camopd.data; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
