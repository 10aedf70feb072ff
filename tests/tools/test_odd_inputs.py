"""Odd files and flags of ``report.py`` and ``prepare_prompts.py``: a page or output, or one line and nothing left."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools import prepare_prompts, report
from tools.run_report.json_values import number, numbers
from tools.run_report.reading import read_metrics, read_runs, read_scores

ROOT = Path(__file__).resolve().parents[2]
GOOD = '{"step": 0, "branch": "general", "loss": 1.0}\n'
HUGE = {"step": 1, "branch": "general", "loss": 1e308, "gap_abs_mean": -1e308, "tokens": 10**400, "time_train": 1e300,
        "gap_lorenz": 7, "sample_grad_norms": {"a": 1}, "gap_gini": [[]], "selected_fraction": "x", "skipped": {},
        "entropy_mean": 5e-324}  # fmt: skip


def refusal(command: Callable[[list[str]], int], flags: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, after progress bars, with which these flags are refused."""
    assert command([str(flag) for flag in flags]) == 2
    said = capsys.readouterr()
    lines = said.err.replace("\r", "\n").splitlines()
    name = "report.py" if command is report.main else "prepare_prompts.py"
    assert said.out == "" and said.err.endswith("\n") and lines[-1].startswith(f"{name}: error: "), said
    assert [line for line in lines if name in line] == lines[-1:]
    assert lines[-1].isprintable() and len(lines[-1]) < 1000
    return lines[-1].removeprefix(f"{name}: error: ")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL = [(Path.mkdir, "is a folder"), (fifo, "is no regular file"), (device, "is no regular file")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no steps"), (b"\n \n", "holds no steps"), (b"\0" * 9 + b"\n{}\n", "line 1: is no JSON object"),
        (b"\xff\xfe\n{}\n", "byte 0 is not UTF-8 text"), (b"[1]\n{}\n", "line 1: is [1]; it must be a JSON object"),
        (b"null\n{}\n", "line 1: is null;"), (b"[" * 100_000 + b"\n{}\n", "line 1: is no JSON object (RecursionError)"),
        (b'{"step": ' + b"9" * 5000 + b"}\n{}\n", "line 1: is no JSON object"),
        (b'{"step": 1' + b"0" * 99 + b', "branch": "a"}\n', "'step' is 1e+99; it must be a whole number from 0 to"),
        (b'{"step": -1, "branch": "a"}\n', "'step' is -1; it must be"),
        (b'{"step": "a\\nb", "branch": "a"}\n', "'step' is 'a\\nb'; it must be"),
        (b'{"step": 0, "branch": "a\\u0000"}\n', "'branch' is 'a\\x00'; it must be"),
        (b'{"step": 0, "branch": "\\ud800"}\n', "'branch' is '\\ud800'; it must be"),
        (b'{"step": 0, "branch": "' + b"x" * 300 + b'"}\n', "'branch' is 'xxx"),
    ],
)  # fmt: skip
def test_metrics_that_are_none(content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    line = refusal(report.main, [tmp_path], capsys)
    assert line.startswith(f"{tmp_path}/metrics.jsonl") and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("make", "words"), SPECIAL)
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "scores.json"])
def test_files_of_a_run_that_are_none(
    make: Callable[[Path], None], words: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    assert refusal(report.main, [tmp_path], capsys).startswith(f"{tmp_path / name}: {words}; it must be a file")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(("make", "_"), SPECIAL)
def test_the_models_config_is_optional(make: Callable[[Path], None], _: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD)
    (tmp_path / "hf").mkdir()
    make(tmp_path / "hf" / "config.json")
    assert read_runs([str(tmp_path)])[0].model == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no JSON"), ("[" * 100_000, "is no JSON"), ("[]", "holds no scores"), ("\x00", "is no JSON"),
        ('{"recovered": {"general": NaN}}', "holds no scores"), ('{"recovered": 3}', "holds no scores"),
        ('{"a\\nb": {"\\u001bc": 2}}', "a b, \\x1bc is 2.0; scores must lie between 0 and 1"),
        ('{"a": {"b": ' + "9" * 5000 + "}}", "is no JSON"),
    ],
)  # fmt: skip
def test_scores_that_are_none(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD)
    (tmp_path / "odd.json").write_text(content)
    line = refusal(report.main, [tmp_path, "--scores", tmp_path / "odd.json"], capsys)
    assert line.startswith(f"{tmp_path / 'odd.json'}: ") and words in line


def test_names_of_scores_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"reco\\nvered": {"\\ud800": 0.5}, "recovered": {"\\u0000": 0.25}}')
    assert read_scores(tmp_path / "scores.json") == {"reco\\nvered": {"\\ud800": 0.5}, "recovered": {"\\x00": 0.25}}


def test_numbers_that_no_figure_can_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [number(value) for value in (1e100, -1e100, 1e101, 10**400, float("nan"), 5e-324, -1e-99, 0, True, "1")]
    assert found == [1e100, -1e100, None, None, None, 0.0, -1e-99, 0.0, None, None]
    assert numbers([1, None, "x"]) == [1.0, None, None] and numbers({"a": 1}) == numbers(7) == []
    (tmp_path / "metrics.jsonl").write_text(GOOD + json.dumps(HUGE) + "\n" + json.dumps(HUGE | {"step": 2}) + "\n")
    _, notes = read_metrics(tmp_path / "metrics.jsonl")
    assert "gap_abs_mean (2), loss (2), time_train (2), tokens (2)." in notes[0]
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "the following arguments are required: RUN"), (["a\0b"], "RUN 'a\\x00b': holds the control character"),
        (["x" * 300], "has a part of 300 bytes"), (["a/" * 3000], "has 6000 bytes; a path has at most"),
        (["{run}", "--output", ""], "argument --output: is empty"), (["\udcff"], "is not UTF-8"),
        (["{run}", "--output", "y" * 256], "has a part of 256 bytes"),
        (["{run}", "--output", "{run}/metrics.jsonl/x"], "cannot be written"),
        (["{run}", "--output", "{run}/fifo"], "cannot be written"), (["{run}", "--title", "a\rb"], "control character"),
        (["{run}", "--scores", "{run}/fifo"], "is no regular file"), (["{run}", "--frob\nx"], "unrecognized arguments"),
        (["a\nb={run}"], "control character"), (["/dev/null"], "is no folder"), (["{run}/fifo"], "is no folder"),
    ],
)  # fmt: skip
def test_flags_of_the_report(flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD)
    os.mkfifo(tmp_path / "fifo")
    assert words in refusal(report.main, [flag.replace("{run}", str(tmp_path)) for flag in flags], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "fifo"}


# prepare_prompts.py -----------------------------------------------------------------------------------------------


def prepare(source: Any, output: Any, *flags: str) -> list[Any]:
    return ["jsonl", "--source", source, "--output", output, *(flags or ("--prompt", "q"))]


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ('{"\\u001b[31m": 1}\n', [], "lacks the column(s) q; found: \\x1b[31m; expected: q"),
        ("[" * 100_000, [], "is not JSON"), ('{"q": 1}\n', ["--prompt", ""], "lacks the column(s) ;"),
        ('{"m": [{"role": {}, "content": "x"}]}\n', ["--messages", "m"], "without a known 'role'"),
        ('{"m": [{"role": ["user"], "content": "x"}]}\n', ["--messages", "m"], "without a known 'role'"),
        ('{"m": [{"\\n\\u0000": 1}]}\n', ["--messages", "m"], "(found: \\n\\x00)"),
        ('{"q": "a"}\n', ["--prompt", "q", "--system", "a\0b"], "--system 'a\\x00b': holds the control character"),
        ('{"q": "a"}\n', ["--prompt", "q", "--category-value", "a\nb"], "--category-value 'a\\nb': holds the control"),
        ('{"q": "a"}\n', ["--prompt", "q", "--count", "9" * 5000], "argument --count: invalid int value"),
    ],
)  # fmt: skip
def test_rows_and_flags(
    content: str, flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert words in refusal(prepare_prompts.main, prepare(tmp_path / "a.jsonl", tmp_path / "out", *flags), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_values_that_json_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"q": ["a"], "t": pa.array([1], pa.date32())}), tmp_path / "a.parquet")
    line = refusal(
        prepare_prompts.main, prepare(tmp_path / "a.parquet", tmp_path / "o", "--prompt", "q", "--tools", "t"), capsys
    )
    assert line == f"--tools t: {tmp_path / 'a.parquet'} row 1 has a value that JSON cannot hold; expected tool schemas"


@pytest.mark.parametrize(("make", "_"), SPECIAL[1:])
def test_sources_and_outputs_that_are_no_files(
    make: Callable[[Path], None], _: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where an output has them in the place of its own files; a temporary file is replaced."""
    make(tmp_path / "odd.jsonl")
    (tmp_path / "a.jsonl").write_text('{"q": "a"}\n')
    line = refusal(prepare_prompts.main, prepare(tmp_path / "odd.jsonl", tmp_path / "out"), capsys)
    assert line.startswith(f"--source: {tmp_path / 'odd.jsonl'} is no regular file; name a file")
    for name, words in (("manifest.json", "is no regular file"), ("prompts.jsonl", "exists already; name another")):
        (tmp_path / name).mkdir()
        make(tmp_path / name / name)
        assert words in refusal(prepare_prompts.main, prepare(tmp_path / "a.jsonl", tmp_path / name), capsys)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / ".partial.prompts.jsonl")
    assert prepare_prompts.main([str(word) for word in prepare(tmp_path / "a.jsonl", tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "prompts.jsonl"}


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "\x00", '{"files": 3}', '{"files": {"a\\u0000": 1}}'])
def test_manifests_that_are_none(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "a"}\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    flags = prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert "name another folder or give --overwrite" in refusal(prepare_prompts.main, flags, capsys)
    assert prepare_prompts.main([str(flag) for flag in (*flags, "--overwrite")]) == 0


@pytest.mark.parametrize("limit", [1, 1000, 40_000])
def test_a_full_disk(limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for it; both fail a write half-way, or at its end."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"q": f"question {row}"}) + "\n" for row in range(1000)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = refusal(prepare_prompts.main, prepare(source, tmp_path / "new" / "out"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (File too large)" in line and line.startswith("--output: ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(number: signal.Signals, status: int, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"q": f"question {row}"}) + "\n" for row in range(400_000))
    words = prepare(source, tmp_path / "new" / "out")
    command = [sys.executable, str(ROOT / "tools" / "prepare_prompts.py"), *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a background job of a shell ignores Ctrl-C
    ) as process:  # fmt: skip
        while not list(tmp_path.rglob(".partial.*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, ""), said
    assert said.splitlines()[-1] == f"prepare_prompts.py: stopped by {number.name}" and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
