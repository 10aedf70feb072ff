"""The toy replication: who takes part with which flags, how its tables come about. World: test_replication_world."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "toy_replication"
sys.path[:0] = [str(FOLDER), str(ROOT / "examples" / "tiny_cpu")]

import contestants  # noqa: E402
import replicate  # noqa: E402
import replication_report as report  # noqa: E402
import replication_world as replication  # noqa: E402


def test_contestants_have_equal_budgets_and_legal_flags(tmp_path: Path) -> None:
    from tests.support.method_flags import METHOD_FLAGS

    lines = {}
    for contestant in contestants.CONTESTANTS:
        flags = contestants.run_flags(
            contestant, contestants.FULL, learning_rate=1e-4, seed=3, inputs=tmp_path, save=tmp_path / "run"
        )
        place = flags.index("--distill-method")
        lines[contestant.key] = flags[:place]
        given = [flag.removeprefix("--").replace("-", "_") for flag in contestant.flags[2::2]]
        assert set(given) <= set(METHOD_FLAGS[flags[place + 1]])
    assert len({tuple(line) for line in lines.values()}) == 1
    assert len(contestants.BY_KEY) == len(contestants.CONTESTANTS)
    flags_of = {key: one.flags for key, one in contestants.BY_KEY.items()}
    assert len(set(flags_of.values())) == len(flags_of), "two contestants are the same"
    assert "--unselected-samples" in flags_of["no-scale"] and "--general-feedback-scale" in flags_of["no-scale"]


def found(key: str, rate: float, seed: int, general: float, domain: float) -> dict[str, Any]:
    return {
        "contestant": key, "learning_rate": rate, "seed": seed, "split": "test", "seconds_training": 1.0,
        "seconds_scoring": 1.0, "series": {},
        "scores": {
            "general": dict.fromkeys(replication.GENERAL_KINDS, general),
            "domain": dict.fromkeys(replication.DOMAIN_KINDS, domain),
        },
    }  # fmt: skip


def test_learning_rates_are_chosen_for_each_family() -> None:
    checks = [
        found("camopd", 1e-4, 101, 0.5, 1.0), found("camopd", 3e-4, 101, 0.9, 0.7),
        found("mopd", 1e-4, 101, 0.5, 1.0), found("mopd", 3e-4, 101, 0.9, 0.5), found("mopd", 1e-4, 102, 0.6, 1.0),
        found("mopd", 3e-4, 102, 0.9, 0.5),
    ]  # fmt: skip
    scores = replicate.mean_scores(checks)
    assert scores["camopd"] == pytest.approx({1e-4: 0.75, 3e-4: 0.8})
    assert scores["mopd"] == pytest.approx({1e-4: 0.775, 3e-4: 0.7})


@pytest.mark.parametrize(
    ("tried", "further"),
    [
        ({1e-4: 0.7, 3e-4: 0.8, 6e-4: 0.7}, None),  # the best lies between worse ones
        ({1e-4: 0.7, 3e-4: 0.8, 6e-4: 0.9}, 1e-3),
        ({1e-4: 0.9, 3e-4: 0.8, 6e-4: 0.7}, 3e-5),
        ({1e-4: 0.7, 6e-4: 0.8, 1e-3: 0.9, 2e-3: 0.95}, None),  # the ladder ends
    ],
)
def test_rates_are_tried_until_the_best_is_no_edge(tried: dict[float, float], further: float | None) -> None:
    assert replicate.next_rate(tried) == further


def test_interval() -> None:
    """The values 1, 2, 3, 4 have s = sqrt(5 / 3), t_3 = 3.18245."""
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-5)
    assert math.isnan(report.interval([1.0])[1])


def test_p_values_and_their_correction() -> None:
    """The values 1, 2, 3 have t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, p = 0.0742."""
    # p from tables of Student's t
    assert report.p_value([1.0, 2.0, 3.0]) == pytest.approx(0.07418, abs=1e-4)
    assert report.p_value([2.0, 2.0]) == 0.0 and report.p_value([0.0, 0.0]) == 1.0
    assert report.holm({"a": 0.01, "b": 0.02, "c": 0.04}) == ["a", "b", "c"]  # limits 0.0167, 0.025, 0.05
    assert report.holm({"a": 0.01, "b": 0.03, "c": 0.04}) == ["a"]  # b fails, and with it whatever comes after
    assert report.holm({"a": 0.02}) == ["a"] and report.holm({"a": 0.02, "b": 0.03, "c": 0.9}) == []


def test_tables_say_what_is_there(tmp_path: Path) -> None:
    """Differences are paired by seed; missing units are rows without numbers; findings name the direction."""
    units = [found("camopd", 1e-4, seed, value, 0.9) for seed, value in ((1, 0.80), (2, 0.70), (3, 0.90))]
    units += [found("mopd", 1e-4, seed, value, 0.9) for seed, value in ((1, 0.75), (2, 0.66), (3, 0.84))]
    units += [found("relaxed-opd", 1e-4, seed, value, 0.9) for seed, value in ((1, 0.95), (2, 0.60))]
    results = {
        "command": "x", "commit": "y", "budget": {"steps": 1, "batch": 2}, "learning_rates": {"camopd": 1e-4},
        "rate_checks": [], "units": units, "units_planned": 30,
    }  # fmt: skip
    assert report.write_report(results, tmp_path / "results").startswith("8 of 30 units")
    text = (tmp_path / "results" / "tables.md").read_text()
    (row,) = [line for line in text.split("## ")[1].splitlines() if line.startswith("| Vanilla MOPD")]
    assert row.split(" | ")[-2].startswith("-5.0 ±") and " 3 " in row
    assert "| SelecTKD (greedy) | 0 |" in text
    assert "general worse (-5.0 ±" in text and "domain no difference shown (+0.0 ± 0.0)" in text
    (line,) = [line for line in text.splitlines() if line.startswith("- Relaxed OPD")]
    assert "general no difference shown" in line
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == results
    for name in report.FIGURES:
        assert (tmp_path / "results" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_units_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="were made with other settings"):
        replicate.Replication(tmp_path, contestants.QUICK, 0).prepare()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--jobs", "-1"], "--jobs -1: must be 0 or more"),
        (["--tables", "nowhere.json"], "--tables nowhere.json: no such file; give a results.json"),
    ],
)
def test_bad_input(flags: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replicate.main([*flags, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"replicate.py: error: {line}\n"
    assert not (tmp_path / "out").exists()
