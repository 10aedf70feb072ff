"""``make replicate QUICK=1`` as a user runs it: tables and figures of real runs; what is done stays done."""

import json
import shutil
import sys
from pathlib import Path

from tests.support.processes import ROOT, run_command

QUICK_SECONDS = 400  # under 3 minutes on an idle machine


def test_quick_replication(tmp_path: Path) -> None:
    output = tmp_path / "output"
    line = [sys.executable, str(ROOT / "examples" / "toy_replication" / "replicate.py"), "--quick"]
    line += ["--output", str(output), "--jobs", "2"]
    assert run_command(line, log=tmp_path / "first.log", time_limit=QUICK_SECONDS) == 0
    results = json.loads((output / "results" / "results.json").read_text())
    assert len(results["units"]) == results["units_planned"] == 12
    by_name = {(unit["contestant"], unit["seed"]): unit for unit in results["units"]}
    general, specialist = by_name["general", 1]["scores"], by_name["specialist", 1]["scores"]
    assert min(general["general"].values()) > 0.95 and max(general["domain"].values()) < 0.05
    assert min(specialist["domain"].values()) > 0.95
    kept = sum(specialist["general"].values()) / 8
    assert 0.58 <= kept <= 0.77, "the specialist keeps what the paper's keep"
    series = by_name["mopd", 1]["series"]
    assert series["step"] == list(range(6)) and series["branch"] == ["mixed"] * 6
    assert series["branch_cosine"][3] is not None and series["branch_cosine"][1] is None
    assert by_name["camopd", 1]["series"]["loss"] != by_name["camopd", 2]["series"]["loss"]
    tables = (output / "results" / "tables.md").read_text()
    assert "12 of 12 units" in tables and "| Relaxed OPD | 2 |" in tables

    # A unit that is gone is made again; the others are not touched, and it ends as before.
    times = {path: path.stat().st_mtime_ns for path in output.glob("units/*/result.json")}
    (gone,) = output.glob("units/selectkd-*-seed2-test")
    before = json.loads((gone / "result.json").read_text())
    shutil.rmtree(gone)
    assert run_command(line, log=tmp_path / "second.log", time_limit=QUICK_SECONDS) == 0
    after = json.loads((gone / "result.json").read_text())
    assert (after["scores"], after["series"]) == (before["scores"], before["series"])
    again = {path: path.stat().st_mtime_ns for path in output.glob("units/*/result.json")}
    assert [path for path in times if times[path] != again[path]] == [gone / "result.json"]
