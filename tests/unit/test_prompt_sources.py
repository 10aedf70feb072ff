"""Rows of local files and of the hub, and the set of files that prepare_prompts writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation import files, sources
from tools.prompt_preparation.output import MANIFEST, OutputSet
from tools.prompt_preparation.sources import RowSource, open_rows

ROWS = [{"q": f'Frage {number} ä 漢字 😀 ] }} "', "n": number} for number in range(50)]


def write(path: Path, rows: list[Any] | None = None) -> Path:
    rows = ROWS if rows is None else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def opened(source: Path | str, **options: Any) -> RowSource:
    return open_rows(str(source), flag="--source", **{"columns": ("q",), "optional": ("n",), **options})


def problem(source: Path | str, **options: Any) -> str:
    """The one line that opening or reading ``source`` ends with."""
    with pytest.raises(ConfigurationError) as caught:
        list(opened(source, **options))
    line = str(caught.value)
    assert line.startswith("--source: ") and "\n" not in line
    return line


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_of_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    source = opened(write(tmp_path / f"a{suffix}"))
    for _ in range(2):  # iterating again starts again
        assert [row.values for row in source] == ROWS
    row = list(source)[16]
    assert row.id == f"a{suffix}:17"
    assert row.where == f"{tmp_path / f'a{suffix}'} {'line' if suffix == '.jsonl' else 'row'} 17"


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Pieces end inside characters, escapes, numbers and objects."""
    monkeypatch.setattr(files, "_PIECE_BYTES", piece)
    path = write(tmp_path / "a.json")
    assert [row.values for row in opened(path)] == ROWS
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    assert [row.values for row in opened(path)] == ROWS


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(write(tmp_path / "b.jsonl").read_bytes().replace(b"\n", b"\n\n", 1))  # and a blank line
    assert [row.values for row in opened(path)] == ROWS


def test_folders_patterns_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00001-of-2.parquet", ROWS[30:])
    write(tmp_path / "data" / "train-00000-of-2.parquet", ROWS[:30])
    write(tmp_path / "data" / "test-00000.parquet", [{"q": "test"}])
    write(tmp_path / ".cache" / "train-old.parquet", [{"q": "hidden"}])
    source = opened(tmp_path, split="train")
    assert [row.values for row in source] == ROWS
    assert [len(list(part)) for part in source.parts()] == [30, 20]
    assert list(source)[30].id == "data/train-00001-of-2.parquet:1"
    described = source.describe()
    assert [file["name"] for file in described["files"]] == [f"data/train-0000{n}-of-2.parquet" for n in (0, 1)]
    assert described["revision"] is None and all(len(file["sha256"]) == 64 for file in described["files"])
    assert [row.values for row in opened(f"{tmp_path}/data/train-*.parquet")] == ROWS
    assert "has no file of the split validation; found: data/test" in problem(tmp_path, split="validation")


def test_a_row_without_a_column_that_the_first_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "a"}, {"n": 1, "other": 2}])
    assert problem(path).endswith("line 2 lacks the column(s) q; found: n, other; expected: q")
    assert [row.values for row in opened(write(tmp_path / "b.jsonl", [{"q": "a"}, {"q": "b", "n": 2}]))] == [
        {"q": "a"}, {"q": "b", "n": 2},
    ]  # fmt: skip


def test_columns_are_checked_before_a_row_is_read(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".json", ".parquet"):
        with pytest.raises(ConfigurationError, match="found: q, n; expected: question"):
            opened(write(tmp_path / f"a{suffix}"), columns=("question",))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", b'{"q": "a"}\n{"q": "\xc3"}\n', "line 2 is not valid UTF-8"),
        ("a.jsonl", b'{"q": "a"}\n{"q": "\\ud83d"}\n', "line 2 is not valid UTF-8"),
        ("a.jsonl", b'{"q": "a"}\n{"q": "b', "line 2 is not JSON"),
        ("a.jsonl", b'{"q": "a"}\n[1]\n', "line 2 is [1]; each row must be an object"),
        ("a.jsonl", b"\n\n", "has no rows; it must hold at least one"),
        ("a.json", b'[{"q": "a"}, {"q": "\xff"}]', "is not valid UTF-8"),
        ("a.json", b'[{"q": "a"}, {"q": "\\udc00"}]', "row 2 is not valid UTF-8"),
        ("a.json", b'[{"q": "a"}, {"q": "b', "row 2 is not JSON"),
        ("a.json", b'[{"q": "a"}, {"q": "b"}', "row 2 is followed by 'the end of the file'; the file is damaged"),
        ("a.json", b'[{"q": "a"} {"q": "b"}]', "row 1 is followed by '{'"),
        ("a.json", b'[{"q": "a"}][', "row 1 is the last of the list, but the file goes on"),
        ("a.json", b'[{"q": "a"}, 3]', "row 2 begins with '3'"),
        ("a.json", b"[]", "has no rows; it must hold at least one"),
        ("a.parquet", b"PAR1 and not more", "is not a readable Parquet file"),
        ("a.csv", b"q\n1\n", "has the extension '.csv'; expected .jsonl, .json or .parquet"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    line = problem(path)
    assert str(path) in line and text in line


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"q": "abcdefgh" * 9 + str(number)} for number in range(700)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # an interrupted download
    assert "is not a readable Parquet file" in problem(path)
    text = pa.array([b"good"] * 300 + [b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"q": text}), path)
    assert f"{path} row 301 is not valid UTF-8" in problem(path)
    write(path, [])
    pq.write_table(pa.table({"q": pa.array([], pa.string())}), path)
    assert "has no rows" in problem(path)


def test_names_that_are_nothing(tmp_path: Path) -> None:
    assert "does not exist" in problem(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no .jsonl, .json or .parquet file" in problem(tmp_path / "empty")
    assert "holds no .jsonl" in problem(f"{tmp_path}/*.jsonl")
    path = write(tmp_path / "a.jsonl")
    assert "--revision abc" in str(pytest.raises(ConfigurationError, opened, path, revision="abc").value)


class Hub:
    """Stands for the hub's client: ``shards`` of rows, of which one may break off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shards: list[list[Any]]) -> None:
        self.asked: list[Any] = []
        self.shards = shards
        monkeypatch.setattr(sources, "hub_commit", lambda name, revision: f"commit of {revision}")
        monkeypatch.setattr(sources, "load_stream", self.load)

    def load(self, *asked: Any) -> Any:
        import datasets

        self.asked.append(asked)
        features = datasets.Features({"q": datasets.Value("string"), "n": datasets.Value("int64")})
        return datasets.IterableDataset.from_generator(
            self.rows, gen_kwargs={"shards": list(range(len(self.shards)))}, features=features
        )

    def rows(self, shards: list[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            for row in self.shards[shard]:
                if row is None:
                    raise ConnectionError("reset\nby peer")
                yield row


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [ROWS[:20], ROWS[20:45], ROWS[45:]])
    source = opened("owner/name", split="train", name="en", revision="main")
    assert hub.asked == [("owner/name", "en", "train", "commit of main")]  # opened at the commit, not at the branch
    assert [row.values for row in source] == [row.values for row in source] == ROWS
    row = list(source)[16]
    assert (row.id, row.where) == ("train:17", "owner/name train row 17")
    described = {"source": "owner/name", "configuration": "en", "revision": "commit of main", "split": "train"}
    assert source.describe() == {**described, "files": []}
    parts = source.parts()
    assert [[row.values for row in part] for part in parts] == [ROWS[:20], ROWS[20:45], ROWS[45:]]
    assert parts[1].describe()["shard"] == "2 of 3" and list(parts[1])[0].id == "train/2:1"


def test_what_goes_wrong_with_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [[*ROWS[:3], None]])
    line = problem("owner/name")
    assert "owner/name train row 4 could not be read (ConnectionError: reset by peer); start again" in line
    assert "lacks the column(s) question; found: q, n;" in problem("owner/name", columns=("question",))
    hub.shards = [[]]
    assert "owner/name train has no rows" in problem("owner/name")

    def absent(*_: Any) -> Any:
        raise ValueError("Unknown split 'x'")

    monkeypatch.setattr(sources, "load_stream", absent)
    assert "(x at v1) cannot be opened on the Hugging Face hub (ValueError: Unknown" in problem(
        "owner/name", split="x", revision="v1"
    )


def prompt(text: str) -> dict[str, Any]:
    return {"id": text, "messages": [{"role": "user", "content": text}]}


def written(folder: Path, *texts: str, identity: object = 1, **options: Any) -> dict[str, Any]:
    with OutputSet(folder, **options) as output:
        if output.is_current({"settings": identity}):
            return {"current": True}
        output.write_rows("a.jsonl", map(prompt, texts))
        return output.finish({"counts": {}})


def test_an_output_appears_whole(tmp_path: Path) -> None:
    manifest = written(tmp_path / "deep" / "out", "ä", "b")
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", MANIFEST]
    assert json.loads((folder / MANIFEST).read_text()) == manifest
    data = (folder / "a.jsonl").read_bytes()
    assert "ä".encode() in data
    assert manifest["files"]["a.jsonl"]["rows"] == 2 and manifest["files"]["a.jsonl"]["bytes"] == len(data)
    assert written(folder, "other") == {"current": True}


def test_an_interrupted_write_leaves_nothing_and_the_old_output(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield prompt("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), OutputSet(tmp_path) as output:
        output.write_rows("a.jsonl", broken())
    assert not list(tmp_path.iterdir())
    written(tmp_path, "old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), OutputSet(tmp_path, overwrite=True) as output:
        output.is_current({"settings": 2})
        output.write_rows("a.jsonl", broken())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_was_cut_off_by_force_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / ".partial.a.jsonl").write_text("half a li")
    (tmp_path / ".partial.manifest.json").write_text("{")
    (tmp_path / "a.jsonl").write_text(json.dumps(prompt("a")) + "\n")  # renamed before the manifest could be
    written(tmp_path, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", MANIFEST]


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written(folder, "a")
    refused = pytest.raises(ConfigurationError, written, folder, "b", identity=2)
    assert "other settings" in str(refused.value) and "--overwrite" in str(refused.value)
    (folder / "a.jsonl").write_text("changed\n")
    assert "a.jsonl is not as manifest.json says" in str(pytest.raises(ConfigurationError, written, folder, "a").value)
    written(folder, "b", identity=2, overwrite=True)
    assert json.loads((folder / "a.jsonl").read_text())["id"] == "b"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text("mine\n")
    assert "exists already" in str(pytest.raises(ConfigurationError, written, tmp_path / "mine", "a").value)
    assert (tmp_path / "mine" / "a.jsonl").read_text() == "mine\n"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a.jsonl"]


def test_rows_that_the_trainer_would_refuse_are_not_written(tmp_path: Path) -> None:
    assert "has no text" in str(pytest.raises(ConfigurationError, written, tmp_path, "a", " ").value)
    assert "row \\ud800 is no text" in ascii(pytest.raises(ConfigurationError, written, tmp_path, "\ud800").value)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be used" in str(pytest.raises(ConfigurationError, written, tmp_path / "file", "a").value)
