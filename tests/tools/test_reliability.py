"""The checks of reliability: that they find what they are for, and that the real ones pass a few cases."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.directory import TRACKER
from tests.support.damage import flip_bit, poison
from tests.support.processes import run_command, run_ranks
from tests.support.runs import pretrain
from tests.support.worlds import make_world
from tools import reliability
from tools.reliability_checks.inputs import Case, judge
from tools.reliability_checks.kills import differences

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with two checkpoints."""
    world = make_world(tmp_path_factory.mktemp("reliability"))
    save = world.root / "whole"
    assert run_ranks(pretrain, 1, world.flags(save=save, save_interval=1, max_response_length=8)) == [0]
    return save


def test_a_run_is_as_itself(whole: Path, tmp_path: Path) -> None:
    assert list(differences(Path(shutil.copytree(whole, tmp_path / "run")), whole)) == []


def spoil_record(save: Path) -> None:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] += 1e-9
    (save / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def repeat_record(save: Path) -> None:
    text = (save / "metrics.jsonl").read_text()
    (save / "metrics.jsonl").write_text(text + text.splitlines(keepends=True)[-1])


SPOILED: dict[str, tuple[Any, str]] = {
    "a record": (spoil_record, "metrics.jsonl"),
    "a record twice": (repeat_record, "metrics.jsonl"),
    "a weight": (lambda run: poison(run / "iter_0000002", "decoder.final_layernorm.weight", 0.5), "final_layernorm"),
    "a moment": (
        lambda run: poison(run / "iter_0000001", "optimizer.state.exp_avg.decoder.final_layernorm.weight", 0.5),
        "exp_avg",
    ),
    "a file": (lambda run: flip_bit(run / "iter_0000001" / "metadata.json"), "metadata.json is damaged"),
    "the tracker": (lambda run: (run / TRACKER).write_text("1"), TRACKER),
    "checksums": (lambda run: (run / "iter_0000002" / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
    "a lock": (lambda run: (run / "run.lock").touch(), "left behind: run.lock"),
}


@pytest.mark.parametrize("case", SPOILED.values(), ids=SPOILED)
def test_differences_are_found(case: tuple[Any, str], whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    spoil, named = case
    spoil(run)
    assert any(named in problem for problem in differences(run, whole))


@pytest.mark.parametrize(
    ("body", "outcome", "problem"),
    [
        ("import sys; print('x: error: y', file=sys.stderr); sys.exit(2)", "refused", None),
        ("import sys; print('x', file=sys.stderr); sys.exit(1)", "refused", "status 1"),
        ("import sys; print('x\\ny', file=sys.stderr); sys.exit(2)", "refused", "2 lines"),
        ("raise KeyError(3)", "refused", "status 1"),
        ("pass", "refused", "status 0"),
        ("import os; os._exit(2)", "refused", "status 2, 0 lines"),
        ("import sys; open(sys.argv[1], 'w'); print('x', file=sys.stderr); sys.exit(2)", "refused", "left behind"),
        ("print('WARNING: going on from iter_0000002')", "passed over", None),
        ("pass", "passed over", "status 0"),
    ],
)
def test_outcomes_are_judged(body: str, outcome: str, problem: str | None, tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "folder"
    script.write_text(body)
    folder.mkdir()
    found = judge(Case("case", (str(script), str(folder / "new")), outcome), folder)
    assert found is None if problem is None else found is not None and problem in found


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["kills", "--layout", "tp0"], "--layout 'tp0': expected sizes such as tp2, pp2, dp2 or tp2pp2"),
        (["kills", "--layout", "tp2tp2"], "--layout 'tp2tp2': expected sizes such as tp2, pp2, dp2 or tp2pp2"),
        (["inputs", "--count", "0"], "--count 0: must be at least 1"),
        (["inputs", "--work", os.sep], "--work /: is there already; name a new folder"),
        (["kills", "--count", "x"], "argument --count: invalid int value: 'x'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_command_lines(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reliability.main(words) == 2
    assert capsys.readouterr().err == f"reliability.py: error: {line}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["inputs", "--count", "28"], "28 inputs; 0 not as promised"),
        (["kills", "--count", "3", "--layout", "dp1"], "; 0 differences"),
    ],
)
def test_the_promises_hold(words: list[str], line: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    status = run_command([sys.executable, str(ROOT / "tools" / "reliability.py"), *words], log=log, time_limit=400)
    assert status == 0 and line in log.read_text(), log.read_text()[-3000:]
