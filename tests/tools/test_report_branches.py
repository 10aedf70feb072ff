"""Branches in reports: any number of them, named by the records alone."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tools import report
from tools.run_report import series, summary
from tools.run_report.branches import branch_names, colour_and_line, in_order, pairs
from tools.run_report.curves import GRADIENTS, OUTCOME
from tools.run_report.drawing import draw
from tools.run_report.figures import PALETTE
from tools.run_report.reading import Run, read_runs

NAMES = ("general", "domain", "code", "math")


def record(step: int, branch: str, names: tuple[str, ...], **values: Any) -> dict[str, Any]:
    """A step that measured the gradients of all branches."""
    measured: dict[str, Any] = {f"{name}_grad_norm": 1.0 + place for place, name in enumerate(names)}
    for first, second in combinations(names, 2):
        pair = "" if len(names) == 2 else f"_{first}:{second}"
        measured |= {f"branch_cosine{pair}": 0.25, f"branch_dot_product{pair}": -0.5}
    return {"step": step, "branch": branch, "loss": 1.0, "gap_abs_mean": 2.0, "reverse_kl": 1.0, **measured, **values}


@pytest.fixture
def make(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Run]:
    def made(records: list[dict[str, Any]]) -> Run:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        return read_runs([f"run={tmp_path}"])[0]

    return made


def legend_of(run: Run, name: str) -> dict[str, str]:
    """Return what the legend of a figure says, with the colour of each."""
    plot = draw(next(curve for curve in (*OUTCOME, *GRADIENTS) if curve.name == name), [run])
    assert plot is not None
    legend = plot.figure.legends[0]
    colours = [str(line.get_color()) for line in legend.get_lines()]
    return dict(zip([text.get_text() for text in legend.get_texts()], colours, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_curves_and_summary_of_any_number_of_branches(
    make: Callable[[list[dict[str, Any]]], Run], tmp_path: Path, count: int
) -> None:
    names = NAMES[-count:] if count < 4 else NAMES
    run = make([record(step, names[step % count], names) for step in range(4 * count)])
    assert run.branches == names
    for figure in ("gap", "branch-norms"):
        assert list(legend_of(run, figure)) == list(names)
        assert len(set(legend_of(run, figure).values())) == count
    assert [each.variant for each in series.by_pair(run, "branch_cosine")] == list(pairs(names))
    rows = {row[0]: row[1] for row in summary.comparison([run])[1]}
    assert {f"Loss, last 5 steps: {name}" for name in names} <= rows.keys()
    cosines = {name: value for name, value in rows.items() if name.startswith("Cosine")}
    assert len(cosines) == count * (count - 1) // 2 and set(cosines.values()) <= {"+0.250"}
    expected = f"{names[0]} only" if count == 1 else ", ".join(f"{name} × 1" for name in names)
    assert rows["Schedule"] == expected
    assert report.main([str(tmp_path)]) == 0
    assert ("branch-cosine.png" in {path.name for path in (tmp_path / "report").iterdir()}) == (count > 1)


def test_mixed_steps_of_three_branches(make: Callable[[list[dict[str, Any]]], Run]) -> None:
    names = ("general", "code", "math")
    gaps = {f"gap_mean_{name}": -float(place) for place, name in enumerate(names)}
    gaps |= {f"gap_abs_mean_{name}": float(place) for place, name in enumerate(names)}
    run = make([{"step": step, "branch": "mixed", "loss": 1.0, "gap_abs_mean": 9.0, **gaps} for step in range(3)])
    assert run.branches == names
    for metric in ("gap_abs_mean", "reverse_kl"):
        found = {each.variant: each.values.tolist() for each in series.by_branch(run, metric)}
        assert found == {"general": [0.0] * 3, "code": [1.0] * 3, "math": [2.0] * 3}
    assert [each.variant for each in series.by_branch(run, "loss")] == ["mixed"]
    assert summary.schedule(run) == "all of general, code, math in every step"


def test_names_come_from_branches_gaps_and_norms_only() -> None:
    records = [
        {"step": 0, "branch": "a_b", "grad_norm": 1.0, "gap_abs_mean_c": 1.0, "other_grad_norm": 1.0},
        {"step": 1, "branch": "mixed", "gap_abs_mean": 1.0, "gap_abs_mean_domain": 1.0},
        {"step": 2, "branch": "a_b", "grad_norm": 1.0, "d_grad_norm": None, "branch_cosine_a_b:d": None},
    ]
    assert branch_names(records) == ("domain", "a_b", "d")


def test_names_with_underscores_are_paired(make: Callable[[list[dict[str, Any]]], Run]) -> None:
    names = ("a", "a_b", "b")
    run = make([record(0, "b", names)])
    assert [each.variant for each in series.by_pair(run, "branch_dot_product")] == ["a, a_b", "a, b", "a_b, b"]


def test_general_and_domain_keep_their_colours_beside_any_others(make: Callable[[list[dict[str, Any]]], Run]) -> None:
    run = make([record(step, name, ()) for step, name in enumerate(("math", "domain", "code", "general"))])
    colours = legend_of(run, "loss")
    assert list(colours) == ["general", "domain", "code", "math"]
    assert (colours["general"], colours["domain"]) == PALETTE[:2] and len(set(colours.values())) == 4
    assert colour_and_line("mixed", ["general", "domain"]) == (2, 0)  # as ever


@pytest.mark.parametrize("count", [5, 7, 12, 30])
def test_more_branches_than_colours_differ_in_their_lines(count: int) -> None:
    names = in_order(["domain", *(f"b{place:02}" for place in range(count))])
    looks = [colour_and_line(name, names) for name in [*names, "mixed"]]
    assert len(set(looks)) == count + 2 and looks[0] == (1, 0)


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ("aabccaabcc", "a × 2, b × 1, c × 2"), ("aabcca", "a × 2, b × 1, c × 2"),
        ("abacabac", "a × 1, b × 1, a × 1, c × 1"), ("abac", "2 a, 1 b, 1 c steps"),
        ("abcaacb", "3 a, 2 b, 2 c steps"), ("abb", "a × 1, b × 2"),
    ],
)  # fmt: skip
def test_schedule_of_several_branches(make: Callable[[list[dict[str, Any]]], Run], branches: str, words: str) -> None:
    assert summary.schedule(make([record(step, name, ()) for step, name in enumerate(branches)])) == words
