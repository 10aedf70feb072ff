"""Tables and figures of the replication, from its results alone.

Every number is a mean over seeds with a 95% t-interval. Differences to CaMOPD are paired by seed: the runs of one seed
have the same prompts in the same order. If the interval of a difference contains 0, the report says that no difference
is shown.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import contestants
import replication_world as world

from tools.run_report.figures import (
    AXIS,
    PALETTE,
    band,
    label,
    legend,
    mean_interval,
    new_figure,
    png_bytes,
    t_probability,
    t_quantile,
)
from tools.run_report.page import write

TITLES = {
    "1": "Table 1. All methods",
    "3": "Table 3. From Vanilla MOPD to CaMOPD",
    "C": "Appendix C. Schedule, scale and mass target",
}
Rows = dict[str, dict[int, dict[str, Any]]]  # contestant -> seed -> unit


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% t-interval (NaN for a single value)."""
    mean, half = mean_interval([[value] for value in values])
    return float(mean[0]), float(half[0])


def columns(unit: dict[str, Any]) -> dict[str, float]:
    """Return a unit's scores in percent: every general task, and means over groups of tasks and over the domain."""
    general, domain = unit["scores"]["general"], unit["scores"]["domain"]
    parts = {
        "general": list(general.values()),
        "covered": [general[kind] for kind in world.PROXY_KINDS],
        "uncovered": [value for kind, value in general.items() if kind not in world.PROXY_KINDS],
        "domain": list(domain.values()),
    }
    means = {name: 100 * sum(values) / len(values) for name, values in parts.items()}
    return {kind: 100 * value for kind, value in general.items()} | means


def cell(values: Sequence[float], *, signed: bool = False) -> str:
    """Format the mean and its interval for a table."""
    mean, half = interval(values)
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if math.isnan(half) else f"{text} ± {half:.1f}"


def table(rows: Rows, keys: Iterable[str], references: Iterable[str]) -> list[str]:
    """Return a Markdown table: a row per contestant, with its paired differences to CaMOPD in the last columns."""
    names = [*world.GENERAL_KINDS, "covered", "uncovered", "general", "domain"]
    lines = [
        "| | seeds | " + " | ".join(names) + " | Δ general | Δ domain |",
        "|---|---|" + "---|" * (len(names) + 2),
    ]
    labels = contestants.REFERENCES | {key: contestant.label for key, contestant in contestants.BY_KEY.items()}
    for key in [*references, *keys]:
        seeds = rows.get(key, {})
        if not seeds:
            lines.append(f"| {labels[key]} | 0 |" + " |" * (len(names) + 2))
            continue
        scores = {seed: columns(unit) for seed, unit in seeds.items()}
        cells = [cell([score[name] for score in scores.values()]) for name in names]
        differences = ["", ""]
        base = {seed: columns(unit) for seed, unit in rows.get("camopd", {}).items()}
        common = sorted(scores.keys() & base.keys())
        if key in contestants.BY_KEY and key != "camopd" and common:
            differences = [
                cell([scores[seed][name] - base[seed][name] for seed in common], signed=True)
                for name in ("general", "domain")
            ]
        lines.append(f"| {labels[key]} | {len(seeds)} | " + " | ".join([*cells, *differences]) + " |")
    return lines


def findings(rows: Rows) -> list[str]:
    """Describe every contestant's paired differences, and name those that remain after Holm's correction."""
    lines, general = [], {}
    base = {seed: columns(unit) for seed, unit in rows.get("camopd", {}).items()}
    for key, contestant in contestants.BY_KEY.items():
        scores = {seed: columns(unit) for seed, unit in rows.get(key, {}).items()}
        common = sorted(scores.keys() & base.keys())
        if key == "camopd" or len(common) < 2:
            continue
        parts = []
        for side in ("general", "domain"):
            differences = [scores[seed][side] - base[seed][side] for seed in common]
            mean, half = interval(differences)
            if side == "general":
                general[contestant.label] = p_value(differences)
            shown = "no difference shown" if abs(mean) <= half else "better" if mean > 0 else "worse"
            parts.append(f"{side} {shown} ({mean:+.1f} ± {half:.1f})")
        lines.append(f"- {contestant.label}, against CaMOPD: {'; '.join(parts)}.")
    if general:
        left = [label for label in holm(general)]
        lines += [
            "",
            f"These are {len(general)} comparisons, each at 95%. By Holm's correction over them, differences in the "
            f"general score that remain: {', '.join(left) or 'none'}. Intervals are over seeds, that is over the order "
            "of prompts and sampling: one world, one pair of models, the same test prompts in every run.",
        ]
    return lines


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's paired t-test for two or more differences."""
    mean, half = interval(differences)
    if half == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    freedom = len(differences) - 1
    return 1.0 - t_probability(abs(mean) / half * t_quantile(0.95, freedom), freedom)


def holm(p_values: dict[str, float], level: float = 0.05) -> list[str]:
    """Return the names whose null hypothesis Holm's step-down procedure rejects."""
    rejected = []
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > level / (len(p_values) - place):
            break
        rejected.append(name)
    return rejected


def _commits(results: dict[str, Any]) -> str:
    """Name the commits of units that were not made at the commit of the tables."""
    units = [*results["units"], *results["rate_checks"], *results.get("units_at_common_rate", [])]
    others = sorted({unit["commit"] for unit in units if unit.get("commit")} - {results["commit"]})
    return f" (some made at {', '.join(others)})" if others else ""


def rate_table(results: dict[str, Any]) -> list[str]:
    """Return a Markdown table of every method family's validation scores at every learning rate tried."""
    found: dict[str, dict[float, list[dict[str, float]]]] = {}
    for unit in results["rate_checks"]:
        family = contestants.BY_KEY[unit["contestant"]].family
        found.setdefault(family, {}).setdefault(unit["learning_rate"], []).append(columns(unit))
    if not found:
        return []
    rates = sorted({rate for tried in found.values() for rate in tried})
    lines = ["", "## Learning rates: general / domain score on validation prompts", ""]
    lines += ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for family, tried in found.items():
        cells = []
        for rate in rates:
            scores = tried.get(rate, [])
            text = " / ".join(cell([one[side] for one in scores]) for side in ("general", "domain")) if scores else ""
            cells.append(f"**{text}**" if rate == results["learning_rates"][family] else text)
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    seeds = len({unit["seed"] for unit in results["rate_checks"]})
    return [*lines, "", f"Each of {seeds} seed(s); bold: the best mean of both scores, taken for the tables below."]


def curves(units: dict[int, dict[str, Any]], name: str, branch: str | None = None) -> tuple[list[int], list[Any]]:
    """Return the steps (of ``branch``) at which most seeds measured ``name``, and the values [seeds][steps].

    A value is NaN where a seed did not measure it.
    """
    points: dict[int, dict[int, float]] = {}
    for seed, unit in units.items():
        series = unit["series"]
        if name not in series:
            continue
        for step, served, value in zip(series["step"], series["branch"], series[name], strict=True):
            if value is not None and (branch is None or served == branch):
                points.setdefault(step, {})[seed] = value
    steps = [step for step in sorted(points) if 2 * len(points[step]) > len(units)]
    return steps, [[points[step].get(seed, math.nan) for step in steps] for seed in units]


def over_steps(rows: Rows, name: str, y: str, lines: Sequence[tuple[str, str | None, str]], **limits: Any) -> Any:
    """Draw ``name`` over the steps; each of ``lines`` is (contestant, branch or None for all, label)."""
    figure, axes = new_figure()
    axes.axhline(0.0, color=AXIS, linewidth=0.8)
    for color, (key, branch, text) in zip(PALETTE, lines, strict=False):
        steps, values = curves(rows.get(key, {}), name, branch)
        if steps:
            band(axes, steps, values, text, color, marker=".")
    label(axes, x="Step", y=y)
    axes.set(**limits)
    legend(figure, axes)
    return figure


def scores(rows: Rows) -> Any:
    """Draw the final domain score over the general score, with intervals; without the control, which lies far away."""
    figure, axes = new_figure((7.0, 6.0))
    shown = [key for key, one in contestants.BY_KEY.items() if {"1", "3"} & set(one.tables) and rows.get(key)]
    for number, key in enumerate(key for key in shown if key != contestants.CONTROL):
        found = [columns(unit) for unit in rows[key].values()]
        (x, dx), (y, dy) = (interval([one[side] for one in found]) for side in ("general", "domain"))
        axes.errorbar(
            x, y, xerr=None if math.isnan(dx) else dx, yerr=None if math.isnan(dy) else dy, fmt="osDv^P*X"[number % 8],
            color=PALETTE[number % len(PALETTE)], capsize=3, label=contestants.BY_KEY[key].label,
        )  # fmt: skip
    label(axes, x="General score (%)", y="Domain score (%)")
    legend(figure, axes)
    return figure


_BOTH = [(key, None, contestants.BY_KEY[key].label) for key in contestants.DIAGNOSED]
_BRANCHES = [("camopd", branch, f"{branch} steps") for branch in ("general", "domain")]
# File name -> (caption, function that draws the figure).
FIGURES: dict[str, tuple[str, Any]] = {
    "figure1_dot_product": (
        "Figure 1. Dot product of the general- and the domain-branch gradient at the same parameters.",
        lambda rows: over_steps(rows, "branch_dot_product", "Dot product", _BOTH),
    ),
    "figure1_cosine": (
        "Figure 1, scale-free: the cosine of the two gradients.",
        lambda rows: over_steps(rows, "branch_cosine", "Cosine", _BOTH),
    ),
    "figure3_gcg": (
        "Figure 3. Gradient coherence gain of CaMOPD's selected samples over all samples, by branch.",
        lambda rows: over_steps(rows, "gradient_coherence_gain", "Gradient coherence gain (%)", _BRANCHES),
    ),
    "figure3_selected": (
        "Figure 3. Share of the samples that CaMOPD selects, by branch.",
        lambda rows: over_steps(rows, "selected_fraction", "Selected share of samples", _BRANCHES, ylim=(0, 1)),
    ),
    "scores": ("General and domain score at the end; mean and 95% interval over seeds.", scores),
}


def write_report(results: dict[str, Any], folder: Path) -> str:
    """Write ``tables.md``, ``results.json`` and the figures to ``folder``; return a summary in one line."""
    rows: Rows = {}
    for unit in results["units"]:
        rows.setdefault(unit["contestant"], {})[unit["seed"]] = unit
    done = [*results["units"], *results["rate_checks"], *results.get("units_at_common_rate", [])]
    seconds = sum(unit["seconds_training"] + unit["seconds_scoring"] for unit in done)
    budget = results["budget"]
    lines = [
        "# Toy-scale replication: results",
        "",
        f"Made by `{results['command']}` at commit {results['commit'] or 'unknown'}: {len(results['units'])} of "
        f"{results['units_planned']} units{_commits(results)}, {seconds / 60:.0f} minutes of one core in all (with the "
        "trials of learning rates). "
        f"Every run: {budget['steps']} steps of {budget['batch']} prompts, one response each. Scores are percent of "
        "held-out prompts answered exactly, greedily; ± is half a 95% t-interval over seeds; Δ is the paired "
        "difference to CaMOPD.",
        "",
        "Learning rates"
        + (
            ", chosen by the mean of general and domain score on validation prompts, with seeds that the tables do not "
            "use; a family's first contestant tries for all of it: "
            if results["rate_checks"]
            else ", not chosen by trials: "
        )
        + ", ".join(f"{family} {rate:g}" for family, rate in results["learning_rates"].items())
        + ".",
    ]
    lines += rate_table(results)
    for name, title in TITLES.items():
        keys = [key for key, contestant in contestants.BY_KEY.items() if name in contestant.tables]
        references = list(contestants.REFERENCES) if name == "1" else []
        lines += ["", f"## {title}", "", *table(rows, keys, references)]
    lines += ["", "## What the differences show", "", *findings(rows)]
    if results.get("units_at_common_rate"):
        at_one: Rows = {}
        for unit in results["units_at_common_rate"]:
            at_one.setdefault(unit["contestant"], {})[unit["seed"]] = unit
        rate = results["budget"]["common_rate"]
        lines += ["", f"## The methods once more, all at learning rate {rate:g}", "", *table(at_one, at_one, [])]
        lines += ["", *findings(at_one)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, (caption, draw) in FIGURES.items():
        write(folder / f"{name}.png", png_bytes(draw(rows)))
        lines += ["", f"![{caption}]({name}.png)", "", caption]
    write(folder / "tables.md", "\n".join(lines) + "\n")
    write(folder / "results.json", json.dumps(results) + "\n")
    return f"{len(results['units'])} of {results['units_planned']} units; tables and figures: {folder}"
