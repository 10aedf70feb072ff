"""``prepare_prompts.py nemotron``: proportions, what is passed over, determinism, going on after an interruption."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_camopd.data import read_prompts
from tests.support.nemotron_files import SPLIT_FILES, TOOLS, prompts, row
from tools.prepare_prompts import main
from tools.prompt_preparation import nemotron
from tools.prompt_preparation.nemotron import OFFICIAL, quotas
from tools.prompt_preparation.selection import Sample, priority

ROWS = {"chat": 60, "code": 60, "math": 60, "stem": 200, "tool_calling": 60}


def rows_of(split: str) -> list[dict[str, Any]]:
    """Every tenth row is unusable, every seventh repeats the text of the one before."""
    rows = []
    for number in range(ROWS[split]):
        text = f"{split} question {number - (number % 7 == 6)}"
        rows.append(row(split, number, ("-", " ")[number // 10 % 2] if number % 10 == 5 else text))
    return rows


def write_source(folder: Path, *, files: int = 3, order: int = 1) -> Path:
    (folder / "data").mkdir(parents=True)
    for split, prefix in SPLIT_FILES.items():
        rows = rows_of(split)[::order]
        for number in range(files):
            path = folder / "data" / f"{prefix}-{number:05}-of-{files:05}.parquet"
            pq.write_table(pa.Table.from_pylist(rows[number::files]), path)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("nemotron") / "source")


def prepare(source: Path, output: Path, *flags: object) -> int:
    return main(["nemotron", "--source", str(source), "--output", str(output), "--count", "100", *map(str, flags)])


def test_quotas_are_the_largest_remainders() -> None:
    assert quotas(10_000) == {"chat": 291, "code": 739, "math": 797, "stem": 8052, "tool_calling": 121}
    total = sum(OFFICIAL.values())
    assert total == 25_659_642
    for count in (1, 7, 100, 9_999, 25_659_642):
        found = quotas(count)
        assert sum(found.values()) == count
        assert all(abs(found[split] - count * OFFICIAL[split] / total) < 1 for split in OFFICIAL)
    assert quotas(25_659_642) == OFFICIAL


def test_what_is_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(source, tmp_path / "a") == 0
    rows = prompts(tmp_path / "a")
    assert Counter(row["category"] for row in rows) == Counter(quotas(100))
    texts = [found["messages"][0]["content"] for found in rows]
    assert len(set(texts)) == 100 and not {"-", " "} & set(texts)
    assert all([message["role"] for message in row["messages"]] == ["user"] for row in rows)
    for found in rows:
        assert ("tools" in found) == (found["category"] == "tool_calling")
        assert found.get("tools", TOOLS) == TOOLS
    written = (tmp_path / "a" / "prompts.jsonl").read_text()
    assert "SECRET" not in written and "system text" not in written
    assert len(read_prompts([tmp_path / "a" / "prompts.jsonl"], flag="--general-prompts").prompts) == 100
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    stem = manifest["counts"]["stem"]
    assert stem["asked for"] == stem["sampled"] == 81 and stem["rows"] == 200 and stem["blank or -"] == 20
    assert manifest["row_ids"] == [row["id"] for row in rows]
    assert {file["sha256"] for part in manifest["made_from"]["sources"]["stem"] for file in part["files"]}
    assert "stem, sampled" in capsys.readouterr().out


def test_the_same_bytes_twice_and_for_other_files(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "a") == prepare(source, tmp_path / "b") == 0
    first = {name: (tmp_path / "a" / name).read_bytes() for name in ("prompts.jsonl", "manifest.json")}
    assert first == {name: (tmp_path / "b" / name).read_bytes() for name in first}
    other = write_source(tmp_path / "other", files=5, order=-1)
    assert prepare(other, tmp_path / "c") == 0
    assert prompts(tmp_path / "c") == prompts(tmp_path / "a")
    assert prepare(source, tmp_path / "d", "--seed", 5) == 0
    assert prompts(tmp_path / "d") != prompts(tmp_path / "a")


def test_unusable_rows_are_replaced_and_too_few_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    (source / "data").mkdir(parents=True)
    for split, prefix in SPLIT_FILES.items():
        quota = quotas(100)[split]
        good = [row(split, number, f"{split} {number}") for number in range(quota)]
        bad = [row(split, 900 + number, "-") for number in range(50)]
        pq.write_table(pa.Table.from_pylist([*bad, *good, *good[:1]]), source / "data" / f"{prefix}-0.parquet")
    assert prepare(source, tmp_path / "out") == 0
    assert len(prompts(tmp_path / "out")) == 100
    assert main(["nemotron", "--source", str(source), "--output", str(tmp_path / "more"), "--count", "102"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "distinct usable prompts in" in line and "a smaller --count, or --quota code=7" in line
    assert not (tmp_path / "more" / "prompts.jsonl").exists() and not (tmp_path / "more" / "manifest.json").exists()


def test_an_interrupted_command_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(source, tmp_path / "whole") == 0
    monkeypatch.setattr(nemotron, "_SECONDS_BETWEEN_STATES", -1.0)
    taken = Counter[str]()
    take = nemotron.Sampler._take

    def interrupted(self: nemotron.Sampler, split: str, row: Any) -> None:
        taken[split] += 1
        if taken["math"] == 30:
            raise KeyboardInterrupt
        take(self, split, row)

    monkeypatch.setattr(nemotron.Sampler, "_take", interrupted)
    assert prepare(source, tmp_path / "out") == 130
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".partial.state.json"]
    taken.clear()
    taken["math"] = 100
    assert prepare(source, tmp_path / "out") == 0
    assert "chat" not in taken and taken["math"] == 100 + 40  # one of its three files was done
    for name in ("prompts.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_an_output_is_left_alone_or_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(source, tmp_path / "out") == 0
    before = (tmp_path / "out" / "prompts.jsonl").stat().st_mtime_ns
    assert prepare(source, tmp_path / "out") == 0
    assert (tmp_path / "out" / "prompts.jsonl").stat().st_mtime_ns == before
    assert prepare(source, tmp_path / "out", "--seed", 9) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out", "--seed", 9, "--overwrite") == 0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--files-per-split", "0"], "--files-per-split 0: must be at least 1"),
        (["--revision", "abc"], "--revision abc:"),
        (["--max-characters", "0"], "--max-characters 0"),
    ],
)
def test_bad_flags(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    assert prepare(source, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert text in error and "\n" not in error


def test_bad_sources(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Path(shutil.copytree(source, tmp_path / "missing"))
    for path in (missing / "data").glob("math-*"):
        path.unlink()
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    (damaged / "data" / "code-00001-of-00003.parquet").write_bytes(b"PAR1 cut off")
    renamed = Path(shutil.copytree(source, tmp_path / "renamed"))
    for path in (renamed / "data").glob("stem-*"):
        pq.write_table(pq.read_table(path).rename_columns({"messages": "chat"}), path)
    for folder, text in ((missing, "math"), (damaged, "code-00001"), (renamed, "lacks the column(s) messages; found:"),
                         (tmp_path / "nowhere", "does not exist")):  # fmt: skip
        assert prepare(folder, tmp_path / "out") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("prepare_prompts.py: error: --source: ") and text in error
        assert not (tmp_path / "out" / "prompts.jsonl").exists()


def test_samples_are_uniform() -> None:
    """Each of 40 texts is in a sample of 10 about a quarter of the time, over 2,000 seeds (sd 19)."""
    counts = Counter[int]()
    for seed in range(2000):
        sample = Sample(10)
        for text in range(40):
            sample.offer(priority(seed, "split", str(text)), str(text), text)
        counts.update(sample.items())
    assert sum(counts.values()) == 20_000 and all(abs(counts[text] - 500) < 90 for text in range(40))


def test_a_sample_keeps_the_smallest_whatever_the_order() -> None:
    ranks = [priority(1, "x", str(number)) for number in range(200)]
    expected = [number for _, number in sorted((rank, number) for number, rank in enumerate(ranks))][:17]
    for step in (1, -1):
        sample = Sample(17)
        for number in list(range(200))[::step]:
            sample.offer(ranks[number], str(number), number)
            if number % 50 == 0:
                saved = json.loads(json.dumps(sample.state_dict()))
                sample = Sample(17)
                sample.load_state_dict(saved)
        assert sample.items() == expected
