"""Sources of ``prepare_prompts.py``: local files of every kind, and the hub's path through the real ``datasets``."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_camopd.errors import ConfigurationError
from tools.prepare_prompts import main
from tools.prompt_preparation import sources
from tools.prompt_preparation.sources import open_rows

ROWS: list[dict[str, Any]] = [
    {"question": f"q {number} é", "answer": "x" * number, "extra": None} for number in range(25)
]


def read(source: Any, **options: Any) -> list[tuple[str, str]]:
    rows = open_rows(str(source), **({"flag": "--source", "columns": ("question",)} | options))
    return [(row.id, row.values["question"]) for row in rows]


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(source, **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--source: ")
    return str(caught.value)


def write_kinds(folder: Path) -> dict[str, Path]:
    paths = {kind: folder / f"rows.{kind}" for kind in ("jsonl", "json", "parquet")}
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    paths["json"].write_text(json.dumps(ROWS, indent=2))
    pq.write_table(pa.Table.from_pylist(ROWS), paths["parquet"])
    return paths


def test_every_kind_gives_the_same_rows(tmp_path: Path) -> None:
    for path in write_kinds(tmp_path).values():
        found = read(path)
        assert [text for _, text in found] == [row["question"] for row in ROWS]
        assert found[3][0].startswith(path.name + ":")
        described = open_rows(str(path), flag="--source", columns=("question",)).describe()
        assert described["files"][0]["bytes"] == path.stat().st_size and len(described["files"][0]["sha256"]) == 64


def test_a_json_list_of_pieces(tmp_path: Path) -> None:
    """Objects longer than what is read at once."""
    rows = [{"question": "é" * (700_000 * (1 + number % 3))} for number in range(5)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    assert [text for _, text in read(path)] == [row["question"] for row in rows]


def test_folders_and_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for part in range(2):
            path = tmp_path / "data" / f"{split}-{part:05}-of-00002.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"question": f"{split} {part}"}) + "\n")
    assert [text for _, text in read(tmp_path, split="train")] == ["train 0", "train 1"]
    assert len(read(tmp_path)) == 4
    assert "has no file of the split validation" in error_of(tmp_path, split="validation")
    rows = open_rows(str(tmp_path), flag="--source", columns=("question",), split="test")
    assert [[row.values["question"] for row in part] for part in rows.parts()] == [["test 0"], ["test 1"]]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", b'{"question": "a"}\n{"question": "\xff"}\n', "line 2 is not valid UTF-8"),
        ("a.jsonl", b'{"question": "a"}\n{"other": "a"}\n', "line 2 lacks the column(s) question; found: other"),
        ("a.jsonl", b'{"question": "a"}\n[1]\n', "each row must be an object"),
        ("a.jsonl", b'{"question": "\\ud800"}\n', "line 1 is not valid UTF-8"),
        ("a.json", b'[{"question": "a"}, {"question": ', "the file is damaged or cut off"),
        ("a.json", b'[{"question": "a"}] tail', "the file goes on; it must be one list"),
        ("a.json", b"[]", "has no rows"),
        ("a.parquet", b"PAR1 no more", "is not a readable Parquet file"),
        ("a.csv", b"question\na\n", "has the extension '.csv'; expected .jsonl, .json or .parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = error_of(tmp_path / name)
    assert name in error and text in error


# The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parquet shards behind a hub name: ``datasets`` streams them, only the look-ups of the network are replaced."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        pq.write_table(pa.Table.from_pylist(ROWS[shard::3]), folder / f"{shard}.parquet")
    asked: dict[str, Any] = {}

    def load(name: str, configuration: str | None, split: str, revision: str | None) -> Any:
        from datasets import load_dataset

        asked.update(name=name, configuration=configuration, split=split, revision=revision)
        files = sorted(map(str, folder.glob("*.parquet")))
        return load_dataset("parquet", data_files={split: files}, split=split, streaming=True)

    monkeypatch.setattr(sources, "load_stream", load)
    monkeypatch.setattr(sources, "hub_commit", lambda name, revision: "c0ffee")
    return asked


def test_a_hub_data_set_is_streamed_at_its_commit(hub: dict[str, Any]) -> None:
    rows = open_rows("owner/name", flag="--source", columns=("question",), name="en", split="train", revision="main")
    assert sorted(row.values["question"] for row in rows) == sorted(row["question"] for row in ROWS)
    assert hub == {"name": "owner/name", "configuration": "en", "split": "train", "revision": "c0ffee"}
    assert rows.describe()["revision"] == "c0ffee" and rows.describe()["source"] == "owner/name"
    parts = [[row.values["question"] for row in part] for part in rows.parts()]
    assert [len(part) for part in parts] == [9, 8, 8]
    assert "lacks the column(s) query; found: " in error_of("owner/name", columns=("query",))


def test_the_command_reads_the_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    flags = ["jsonl", "--source", "owner/name", "--prompt", "question", "--output"]
    assert main([*flags, str(tmp_path / "out")]) == main([*flags, str(tmp_path / "again")]) == 0
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (tmp_path / "again" / "prompts.jsonl").read_bytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["written"] == 25 and manifest["made_from"]["source"]["revision"] == "c0ffee"


def test_an_interrupted_download_is_an_error(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = sources.load_stream

    def breaking(*arguments: Any) -> Any:
        def interrupted(row: dict[str, Any], index: int) -> dict[str, Any]:
            if index == 7:
                raise ConnectionError("the connection was lost")
            return row

        return load(*arguments).map(interrupted, with_indices=True)

    monkeypatch.setattr(sources, "load_stream", breaking)
    assert main(["jsonl", "--source", "owner/name", "--prompt", "question", "--output", str(tmp_path / "out")]) == 2
    assert "could not be read (ConnectionError: the connection was lost)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, revision: str | None) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(sources, "hub_commit", unreachable)
    assert "owner/name (train) cannot be opened on the Hugging Face hub (ConnectionError: no route)" in error_of(
        "owner/name"
    )
