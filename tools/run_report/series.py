"""Series of numbers over steps: taken from records, split by branch, thinned for drawing, averaged.

Branches have different teachers, so the values of each are a series of its own. A step of several branches gives one
value to each where its record has them (``gap_abs_mean_general``), or one to a further series, ``mixed``.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.run_report.branches import MIXED, NORM, in_order, pair_keys, pairs
from tools.run_report.json_values import number, numbers
from tools.run_report.reading import Run, phase_seconds

ALL = ""  # the variant of a series that neither branch nor pair of branches splits
MOST_POINTS = 2000
NOTABLE = 0.001
PHASES = ("sync", "rollout", "score", "diagnostics", "train")  # in the order of a step


@dataclass(frozen=True)
class Series:
    """values: [n] float64 at steps: [n] float64, rising; NaN where the run had no finite value."""

    variant: str
    steps: np.ndarray
    values: np.ndarray


def by_branch(run: Run, name: str) -> list[Series]:
    """One series for each branch that has any finite ``name``, in the run's order of branches."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in run.records:
        for branch, key in _keys(run, record, name):
            if key in record:
                points.setdefault(branch, []).append((record["step"], _value(record, key)))
    return _series(run, points)


def whole(run: Run, name: str) -> list[Series]:
    """The series of ``name`` over all steps that have it; none where no value is finite."""
    return _series(run, {ALL: [(record["step"], _value(record, name)) for record in run.records if name in record]})


def branch_norms(run: Run) -> list[Series]:
    """Norms of the branches' mean gradients, measured at the same steps."""
    return [
        Series(branch, found.steps, found.values) for branch in run.branches for found in whole(run, f"{branch}{NORM}")
    ]


def by_pair(run: Run, name: str) -> list[Series]:
    """One series for each pair of branches that has any finite ``name``."""
    return [
        Series(label, found.steps, found.values)
        for label, pair in pairs(run.branches).items()
        for key in pair_keys(name, pair, run.branches)
        for found in whole(run, key)
    ]


def lorenz_curves(run: Run) -> dict[str, tuple[int, list[float], float | None]]:
    """Branch -> (step, curve, Gini coefficient) of the latest step with a finite curve."""
    found: dict[str, tuple[int, list[float], float | None]] = {}
    for record in reversed(run.records):
        for branch, key in _keys(run, record, "gap_lorenz"):
            curve = numbers(record.get(key))
            finite = [value for value in curve if value is not None]
            if branch not in found and len(finite) == len(curve) > 1:
                gini = number(record.get(key.replace("lorenz", "gini")))
                found[branch] = record["step"], finite, gini
    return {branch: found[branch] for branch in _order(run, found)}


def sample_norms(run: Run) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Branch -> (step, [M] float64 finite norms of the samples' gradients) of its steps that measured them."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for record in run.records:
        norms = [norm for norm in numbers(record.get("sample_grad_norms")) if norm is not None]
        if norms:
            found.setdefault(record["branch"], []).append((record["step"], np.array(norms)))
    return {branch: found[branch] for branch in _order(run, found)}


def phases_of(runs: Sequence[Run]) -> list[str]:
    """The phases that took at least NOTABLE of the time of any run, in the order of a step, unknown ones last."""
    seen: set[str] = set()
    for run in runs:
        seconds: Counter[str] = Counter()
        for record in run.records:
            seconds.update(phase_seconds(record))
        seen |= {name for name, took in seconds.items() if took > 0 and took >= NOTABLE * seconds.total()}
    return [name for name in PHASES if name in seen] + sorted(seen - set(PHASES))


def skipped_steps(run: Run) -> list[int]:
    """Return the steps whose update was skipped."""
    return [record["step"] for record in run.records if record.get("skipped")]


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` of the points: of each bucket the smallest and the largest value, so that no spike is lost.

    A bucket without any finite value leaves one NaN, a gap in the line.
    """
    if len(values) <= most:
        return steps, values
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(values)), most // 2):
        finite = bucket[np.isfinite(values[bucket])]
        if len(finite) == 0:
            kept.append(int(bucket[0]))
        else:
            kept += sorted({int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])})
    return steps[kept], values[kept]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """[n] mean of the finite values among the ``window`` (odd) around each point, fewer at the ends; NaN of none."""
    assert window % 2 == 1, window
    finite = np.isfinite(values)
    ends = np.arange(len(values))
    low, high = np.maximum(ends - window // 2, 0), np.minimum(ends + window // 2 + 1, len(values))
    sums = np.concatenate([[0.0], np.where(finite, values, 0.0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def last_mean(series: Series, count: int) -> float | None:
    """Mean of the last ``count`` finite values, or of as many as there are."""
    finite = series.values[np.isfinite(series.values)]
    return float(finite[-count:].mean()) if len(finite) else None


def _keys(run: Run, record: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """(branch, name in the record) of what a step says about ``name``."""
    if record["branch"] != MIXED:
        return [(record["branch"], name)]
    own = [(branch, f"{name}_{branch}") for branch in run.branches if f"{name}_{branch}" in record]
    return own or [(MIXED, name)]


def _value(record: dict[str, Any], name: str) -> float:
    value = number(record[name])
    return math.nan if value is None else value


def _series(run: Run, points: Mapping[str, list[tuple[int, float]]]) -> list[Series]:
    made = []
    for variant in _order(run, points):
        pairs = np.array(points[variant], dtype=np.float64).reshape(-1, 2)
        if np.isfinite(pairs[:, 1]).any():
            made.append(Series(variant, pairs[:, 0], pairs[:, 1]))
    return made


def _order(run: Run, variants: Mapping[str, Any]) -> list[str]:
    """Those of ``variants`` that there are, in the run's order of branches."""
    return [variant for variant in in_order([*run.branches, *variants]) if variant in variants]
