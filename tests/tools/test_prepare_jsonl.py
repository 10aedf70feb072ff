"""``prepare_prompts.py jsonl``: any file with a field map."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.prepare_prompts import main


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path, output: Path, *flags: str) -> int:
    return main(["jsonl", "--source", str(source), "--output", str(output), *flags])


def prompts(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]


def test_texts(tmp_path: Path) -> None:
    rows = [{"q": f"question {number % 8}", "n": number, "kind": "math", "a": "SECRET"} for number in range(10)]
    source = write(
        tmp_path / "a.jsonl", [*rows, {"q": "  ", "n": 99, "kind": "x"}, {"q": "x" * 50, "n": 98, "kind": "x"}]
    )
    flags = ["--prompt", "q", "--id", "n", "--category", "kind", "--system", "Be brief.", "--max-characters", "40"]
    assert run(source, tmp_path / "out", *flags) == 0
    found = prompts(tmp_path / "out")
    assert [row["id"] for row in found] == [str(number) for number in range(8)]
    assert found[3] == {
        "id": "3",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 3"}],
        "category": "math",
    }
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts == {"rows": 12, "duplicates": 2, "without a prompt": 1, "too long": 1, "written": 8}
    assert "SECRET" not in (tmp_path / "out" / "prompts.jsonl").read_text()


def test_sharegpt_conversations_lose_their_answer(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "hello"), ("gpt", "hi"), ("human", "more"), ("gpt", "SECRET")]
    source = tmp_path / "a.json"
    source.write_text(json.dumps([{"conversations": [{"from": role, "value": text} for role, text in turns]}]))
    flags = ["--messages", "conversations", "--role-field", "from", "--content-field", "value"]
    assert run(source, tmp_path / "out", *flags) == 0
    roles = [(message["role"], message["content"]) for message in prompts(tmp_path / "out")[0]["messages"]]
    assert roles == [("system", "s"), ("user", "hello"), ("assistant", "hi"), ("user", "more")]


def test_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": f"question {number}"} for number in range(50)]
    forward, backward = write(tmp_path / "f.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])
    for source, name in ((forward, "f"), (backward, "b"), (forward, "again")):
        assert run(source, tmp_path / name, "--prompt", "q", "--count", "20") == 0
    texts = {name: [row["messages"] for row in prompts(tmp_path / name)] for name in ("f", "b", "again")}
    assert len(texts["f"]) == 20 and texts["f"] == texts["b"] == texts["again"]
    assert (tmp_path / "f" / "manifest.json").read_bytes() == (tmp_path / "again" / "manifest.json").read_bytes()
    assert run(forward, tmp_path / "more", "--prompt", "q", "--count", "51") == 2
    assert "has 50 distinct usable prompts in 50 rows; ask for fewer" in capsys.readouterr().err
    assert not (tmp_path / "more" / "prompts.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "flags", "text"),
    [
        (b'{"q": "a"}\n', ["--prompt", "question"], "lacks the column(s) question; found: q; expected: question"),
        (b'{"q": "a"}\n{"q": "\xff"}\n', ["--prompt", "q"], "line 2 is not valid UTF-8"),
        (b'{"q": "a"}\n{"q": \n', ["--prompt", "q"], "line 2 is not JSON"),
        (b"", ["--prompt", "q"], "has no rows"),
        (b'{"q": " "}\n', ["--prompt", "q"], "not one of 1 rows has a usable prompt"),
        (b'{"q": "a"}\n', ["--messages", "q"], "has no list of messages in that field"),
        (b'{"q": [{"who": "x"}]}\n', ["--messages", "q"], "without a known 'role'"),
        (b'{"q": "a"}\n', [], "one of the arguments --prompt --messages is required"),
        (b'{"q": "a"}\n', ["--prompt", "q", "--count", "0"], "--count 0: must be at least 1"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, flags: list[str], text: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(content)
    assert run(source, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("prepare_prompts.py: error: ") and text in error
    assert not (tmp_path / "out" / "prompts.jsonl").exists()
