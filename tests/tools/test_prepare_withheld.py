"""``prepare_prompts.py nemotron``: prompts that the data set holds back, joined from the data sets they came from."""

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.nemotron_files import SPLIT_FILES, prompts, row
from tools.prepare_prompts import main
from tools.prompt_preparation import nemotron
from tools.prompt_preparation.nemotron import quotas

# Data set as metadata names it: (folder of the fixture, files and their rows, what the prompt must be).
CODEFORCES = {
    "id": "1A", "description": "Cover a square.", "input_format": "n", "output_format": "m", "note": None,
    "examples": [{"input": "6 6 4", "output": "4"}, {"input": "1 1 1", "output": "1"}],
}  # fmt: skip
CODEFORCES_PROMPT = (
    "Cover a square.\n\nInput\n\nn\n\nOutput\n\nm\n\nExamples\n\nInput\n\n6 6 4\n\nOutput\n\n4\n\n"
    "Input\n\n1 1 1\n\nOutput\n\n1"
)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set as it is published: not one code row with a prompt, half of chat without; and the four sources."""
    folder = tmp_path_factory.mktemp("withheld")
    origin = [
        *(("taco", "train", number) for number in range(3)), ("taco", "test", 1),
        ("apps", "train", 0), ("code_contests", "valid", 0), ("open-r1/codeforces", "train", 0),
        ("taco", "train", 99), ("leetcode", "train", 0),
    ]  # fmt: skip
    code = [
        row("code", number, "-", metadata=json.dumps({"dataset": name, "split": split, "index": str(index)}))
        for number, (name, split, index) in enumerate([*origin, *origin])
    ]
    code.append(row("code", 99, "-", metadata="no JSON"))
    rows = {split: [row(split, number, f"{split} {number}") for number in range(20)] for split in SPLIT_FILES}
    rows |= {"code": code, "chat": [row("chat", number, "" if number % 2 else f"chat {number}") for number in range(6)]}
    for split, prefix in SPLIT_FILES.items():
        write(folder / "source" / "data" / f"{prefix}-00000-of-00001.parquet", rows[split])
    taco = [{"question": f"taco {number}", "solutions": f"ANSWER {number}"} for number in range(3)]
    write(folder / "taco" / "ALL" / "train-00000-of-00002.parquet", taco[:2])  # a row's number goes over the files
    write(folder / "taco" / "ALL" / "train-00001-of-00002.parquet", taco[2:])
    tests = [{"question": f"taco test {number}", "solutions": ""} for number in range(2)]
    write(folder / "taco" / "ALL" / "test-00000-of-00001.parquet", tests)
    write(folder / "apps" / "train.jsonl", [{"id": 0, "question": "apps 0", "solutions": "ANSWER"}])
    write(folder / "apps" / "test.jsonl", [{"id": 0, "question": "apps test 0", "solutions": "ANSWER"}])
    for split in ("train", "valid"):
        rows_of_split = [{"description": f"contest {split}", "solutions": "ANSWER"}]
        write(folder / "code_contests" / "data" / f"{split}-00000-of-00001-ab.parquet", rows_of_split)
    write(folder / "codeforces" / "data" / "train-00000-of-00001.parquet", [CODEFORCES])
    by_uuid = [{"uuid": f"chat-{number}", "prompt": f"lmsys {number}"} for number in (1, 3)]
    write(folder / "chat.jsonl", [*by_uuid, {"uuid": "chat-5", "prompt": " "}])
    return folder


def prepare(world: Path, output: Path, *flags: object) -> int:
    """Seven code and three chat prompts of 30 are asked for."""
    asked = ["--count", 100, "--quota", "chat=3", "--quota", "code=7", "--quota", "stem=20"]
    arguments = ["nemotron", "--source", world / "source", "--output", output, *asked, *flags]
    return main(list(map(str, arguments)))


def questions(world: Path, *names: str) -> list[str]:
    names = names or ("taco", "apps", "code_contests", "codeforces")
    return ["--code-questions", *(f"{name}={world / name}" for name in names)]


def test_code_questions_are_joined(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(world, tmp_path / "a", *questions(world)) == 0
    rows = prompts(tmp_path / "a")
    assert Counter(row["category"] for row in rows) == Counter(quotas(100) | {"chat": 3, "code": 7, "stem": 20})
    assert {row["messages"][0]["content"] for row in rows if row["category"] == "code"} == {
        "taco 0", "taco 1", "taco 2", "taco test 1", "apps 0", "contest valid", CODEFORCES_PROMPT,
    }  # fmt: skip
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    counts = manifest["counts"]["code"]
    assert counts["rows"] == 19 and counts["joined"] == 14 and counts["blank or -"] == 5
    assert counts["duplicates of kept prompts"] == 7 and counts["sampled"] == 7
    assert len(manifest["made_from"]["withheld"]["taco"]["files"]) == 3
    assert "ANSWER" not in (tmp_path / "a" / "prompts.jsonl").read_text()
    assert "code, joined" in capsys.readouterr().out
    assert prepare(world, tmp_path / "b", *questions(world)) == 0
    for name in ("prompts.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_other_prompts_come_by_uuid(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*questions(world), "--quota", "chat=5"]
    assert prepare(world, tmp_path / "a", *flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "split chat has 3 distinct usable prompts in 6 rows (3 blank or -), 5 are asked for" in line
    assert "--prompts-by-uuid" in line and "--quota chat=3" in line
    assert prepare(world, tmp_path / "a", *flags, "--prompts-by-uuid", world / "chat.jsonl") == 0
    chat = [row for row in prompts(tmp_path / "a") if row["category"] == "chat"]
    assert {row["id"]: row["messages"][0]["content"] for row in chat} == {
        "chat-chat-0": "chat 0", "chat-chat-1": "lmsys 1", "chat-chat-2": "chat 2", "chat-chat-3": "lmsys 3",
        "chat-chat-4": "chat 4",
    }  # fmt: skip


def test_without_them_the_error_says_what_to_give(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(world, tmp_path / "a") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "split code has 0 distinct usable prompts in 19 rows (19 blank or -), 7 are asked for" in line
    assert "--code-questions" in line and "--quota code=0" in line
    taken = Counter[str]()
    take = nemotron.Sampler._take
    monkeypatch.setattr(
        nemotron.Sampler, "_take", lambda self, split, row: (taken.update([split]), take(self, split, row))
    )
    assert prepare(world, tmp_path / "a", *questions(world)) == 0
    assert "chat" not in taken and taken["code"] == 19  # what was read before the error is not read again
    assert prepare(world, tmp_path / "b", "--quota", "code=0") == 0
    assert not [row for row in prompts(tmp_path / "b") if row["category"] == "code"]


def test_the_recipes_script(world: Path, tmp_path: Path) -> None:
    (tmp_path / "questions").symlink_to(world)
    flags = ["--source", str(world / "source"), "--count", "100", "--quota", "chat=3", "--quota", "code=7",
             "--quota", "stem=20"]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    subprocess.run(["bash", root / "examples" / "general_prompts.sh", "prepare", tmp_path, *flags], check=True)
    assert len(prompts(tmp_path / "general")) == sum((quotas(100) | {"chat": 3, "code": 7, "stem": 20}).values())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--quota", "poetry=3"], "--quota poetry=3: must be SPLIT=N"),
        (["--quota", "code=-1"], "--quota code=-1: must be SPLIT=N"),
        (["--quota", "code"], "--quota code: must be SPLIT=N"),
        ([f"--quota={split}=0" for split in SPLIT_FILES], "--quota: leaves no prompts"),
        (["--code-questions", "leetcode=x"], "--code-questions leetcode=x: must be NAME=SOURCE with a NAME of taco"),
        (["--code-questions", "taco"], "--code-questions taco: must be NAME=SOURCE"),
        (["--code-questions", "taco=/no/such/folder"], "--code-questions: /no/such/folder does not exist"),
        (["--code-questions", "apps={world}/code_contests"], "lacks the column(s) question; found: description"),
        (["--prompts-by-uuid", "{world}/apps/train.jsonl"], "lacks the column(s) uuid, prompt; found: id, question"),
    ],
)
def test_bad_flags(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    assert prepare(world, tmp_path / "a", *(flag.format(world=world) for flag in flags)) == 2
    error = capsys.readouterr().err.strip()
    assert text in error and "\n" not in error


def test_a_split_of_questions_that_is_not_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = Path(shutil.copytree(world, tmp_path / "half"))
    (half / "taco" / "ALL" / "test-00000-of-00001.parquet").unlink()
    assert prepare(half, tmp_path / "a", *questions(half, "taco")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("prepare_prompts.py: error: --code-questions: ")
    assert "has no file of the split test; found:" in line
