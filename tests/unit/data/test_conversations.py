"""Conversation files: what is read, what is refused, and that rows are read again as they were checked."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_camopd.data import ConversationSet
from megatron_camopd.errors import ConfigurationError

USER, ANSWER = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}


def write(path: Path, *lines: Any) -> Path:
    """One line for each row: bytes as they are, the rest as JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def error_of(*paths: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        ConversationSet(list(paths), flag="--conversations")
    line = str(caught.value)
    assert line.startswith("--conversations: ") and "\n" not in line
    return line


def test_rows_are_read_again_as_they_were(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [
        {"messages": [USER, ANSWER], "id": 7},
        b"",
        {"messages": [{"role": "system", "content": "é 漢"}, USER, ANSWER, USER], "other": 1},
        {"messages": [USER, call, {"role": "tool", "content": "3"}, ANSWER], "tools": tools},
    ]
    first, second = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", rows[0])
    found = ConversationSet([first, second], flag="--conversations")
    assert len(found) == 4
    assert [found[index].id for index in (3, 0, 2, 1)] == ["7", "7", "a.jsonl:4", "a.jsonl:3"]
    assert found[1].messages[0]["content"] == "é 漢" and found[1].where == f"{first} line 3"
    assert found[2].tools == tools and found[2].messages[1]["content"] == ""
    assert found[0].tools is None and found[0].messages == [USER, ANSWER]
    assert found.sha256 == ConversationSet([first, second], flag="--x").sha256
    assert found.sha256 != ConversationSet([second, first], flag="--x").sha256


def test_weights_are_kept(tmp_path: Path) -> None:
    weights = [0, 1, 0.0, 1.0, True, False, None]
    rows = [{"messages": [USER, ANSWER | {"weight": weight}, USER, ANSWER]} for weight in weights]
    found = ConversationSet([write(tmp_path / "a.jsonl", *rows)], flag="--conversations")
    assert [found[index].messages[1].get("weight") for index in range(len(rows))] == weights


REFUSED = ("weight", "weights", "train_on", "train", "loss_mask", "labels", "chat_template_kwargs", "documents",
           "functions")  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_would_change_what_is_trained(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    values: list[Any] = [0, 1, "last", [1, 0], {"enable_thinking": False}, False]
    for value in values:
        rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], name: value}]
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema({
                "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
                name: pa.array([value]).type,
            })), path)  # fmt: skip
        else:
            write(path, *rows)
        kind = "row" if suffix == ".parquet" else "line"
        assert f'{path} {kind} 2 has a "{name}", which this stage does not read; remove it, or ' in error_of(path)


def test_empty_fields_change_nothing(tmp_path: Path) -> None:
    empty: list[Any] = [None, [], {}, ""]
    rows = [{"messages": [USER, ANSWER], name: value} for name in REFUSED for value in empty]
    assert len(ConversationSet([write(tmp_path / "a.jsonl", *rows)], flag="--conversations")) == 4 * len(REFUSED)


def test_empty_fields_of_messages_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    answer = ANSWER | {"tool_calls": [], "meta": {}, "reasoning_content": ""}
    (found,) = ConversationSet([write(tmp_path / "a.jsonl", {"messages": [USER | {"x": []}, answer]})], flag="--c")
    assert found.messages == [USER, ANSWER | {"reasoning_content": ""}]  # a template may ask whether there is a text


def test_other_fields_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": [USER, ANSWER], "id": n, "source": "x"} for n in range(7)]
    rows += [{"messages": [USER, ANSWER], "score": n % 2 or None, "source": None} for n in range(5)]
    expected = {"source": 7, "score": 2}
    lines = write(tmp_path / "a.jsonl", *rows)
    table = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist(rows + [{"messages": [USER, ANSWER], "source": "y"}]), table, row_group_size=3)
    # Columns are those of the first row.
    assert ConversationSet([lines], flag="--c").unread == expected
    assert ConversationSet([table], flag="--c").unread == {"source": 8}
    assert ConversationSet([lines, table], flag="--c").unread == {"source": 15, "score": 2}
    for statistics in (True, False):
        columns = {
            "messages": [[USER, ANSWER]] * 4, "source": ["x", None, None, ""], "tags": [[1], None, [], None],
            "kwargs": [None, {"a": 1}, {"a": None}, {"a": 2}], "void": pa.nulls(4), "train": pa.nulls(4, pa.bool_()),
        }  # fmt: skip
        bare = tmp_path / "c.parquet"
        pq.write_table(pa.table(columns), bare, write_statistics=statistics, row_group_size=3)
        assert ConversationSet([bare], flag="--c").unread == {"source": 2, "tags": 2, "kwargs": 3}


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"messages": [USER, ANSWER | {"name": "x"}], "score": 1.0}, {"messages": [USER, ANSWER], "score": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = ConversationSet([path], flag="--conversations")
    assert [found[index].messages for index in (1, 0)] == [[USER, ANSWER], [USER, ANSWER | {"name": "x"}]]
    assert found[0].where == f"{path} row 1"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ([1], "is [1]; each row must be an object"),
        ({"prompt": "x"}, 'has no "messages" (found: prompt)'),
        ({"messages": []}, 'has empty "messages"'),
        ({"messages": "x"}, "it must be a list"),
        ({"messages": [USER]}, "has no assistant message, so nothing to learn from; remove the row"),
        ({"messages": [USER, ANSWER | {"content": " "}]}, "has no assistant message with text"),
        ({"messages": [ANSWER, USER, ANSWER]}, "begins with an assistant message; put a system or user message"),
        ({"messages": [USER | {"content": " "}, ANSWER]}, "has an empty prompt"),
        (
            {"messages": [{"role": "human", "content": "x"}, ANSWER]},
            "has role 'human' in messages[0]; roles are",
        ),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, "has a weight in messages[0], a user message; only assistant"),
        (
            {"messages": [USER, ANSWER | {"weight": 0.5}]},
            "has the weight 0.5 in messages[1]; it must be 0 (not trained)",
        ),
        ({"messages": [USER, ANSWER, USER, ANSWER | {"weight": "1"}]}, "has the weight '1' in messages[3]"),
        ({"messages": [USER, ANSWER | {"weight": -1}]}, "has the weight -1 in messages[1]"),
        ({"messages": [USER, ANSWER | {"weight": [1]}]}, "has the weight [1] in messages[1]"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "has no assistant message with text and a weight of 1"),
        (
            {"messages": [USER, ANSWER | {"weight": False}, USER, ANSWER | {"content": ""}]},
            "has no assistant message with text and a weight of 1, so nothing to learn from",
        ),
        ({"messages": [USER, ANSWER], "tools": "no JSON"}, "which is not JSON"),
        ({"messages": [USER, ANSWER], "id": 1.5}, 'has "id" 1.5'),
        (b'{"messages": ', "is not JSON"),
        (b'{"messages": "\xff"}', "is not valid UTF-8"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: Any, text: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}, line)
    error = error_of(path)
    assert error.startswith(f"--conversations: {path} line 2 ") and text in error


def test_bad_files_are_named(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "none.jsonl")
    assert "is empty; it must hold at least one conversation" in error_of(write(tmp_path / "empty.jsonl", b" "))
    assert "has the extension '.json'" in error_of(write(tmp_path / "a.json", {}))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    assert 'has the columns text; it needs "messages"' in error_of(tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match="--conversations: no file given"):
        ConversationSet([], flag="--conversations")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]})
    found = ConversationSet([path], flag="--conversations")
    path.write_text("x" * 40)
    with pytest.raises(ConfigurationError, match="changed while it was in use"):
        found[1]
