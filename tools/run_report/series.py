"""Series of numbers over steps: taken from records, split by branch, thinned for drawing, averaged.

General and domain steps have different teachers, so their values are series of their own. A step of both branches gives
one value to each where its record has them (``gap_abs_mean_general``), or one to a third series, ``mixed``.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.run_report.reading import Run, number, phase_seconds

BRANCHES = ("general", "domain", "mixed")
ALL = ""  # the variant of a series that no branch splits
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
    """One series for each branch that has any finite ``name``, in the order of BRANCHES."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in run.records:
        for branch, key in _keys(record, name):
            if key in record:
                points.setdefault(branch, []).append((record["step"], _value(record, key)))
    return _series(points)


def whole(run: Run, name: str) -> list[Series]:
    """The series of ``name`` over all steps that have it; none where no value is finite."""
    return _series({ALL: [(record["step"], _value(record, name)) for record in run.records if name in record]})


def branch_norms(run: Run) -> list[Series]:
    """Norms of the two branches' mean gradients, measured at the same steps."""
    return [
        Series(branch, found.steps, found.values)
        for branch in ("general", "domain")
        for found in whole(run, f"{branch}_grad_norm")
    ]


def lorenz_curves(run: Run) -> dict[str, tuple[int, list[float], float | None]]:
    """branch -> (step, curve, Gini coefficient) of the latest step with a finite curve."""
    found: dict[str, tuple[int, list[float], float | None]] = {}
    for record in reversed(run.records):
        for branch, key in _keys(record, "gap_lorenz"):
            curve = [number(value) for value in record.get(key) or []]
            finite = [value for value in curve if value is not None]
            if branch not in found and len(finite) == len(curve) > 1:
                gini = number(record.get(key.replace("lorenz", "gini")))
                found[branch] = record["step"], finite, gini
    return {branch: found[branch] for branch in BRANCHES if branch in found}


def sample_norms(run: Run) -> dict[str, list[tuple[int, np.ndarray]]]:
    """branch -> (step, [M] float64 finite norms of the samples' gradients) of its steps that measured them."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for record in run.records:
        values = record.get("sample_grad_norms")
        norms = [norm for value in values if (norm := number(value)) is not None] if isinstance(values, list) else []
        if norms:
            found.setdefault(record["branch"], []).append((record["step"], np.array(norms)))
    return {branch: found[branch] for branch in _order(found)}


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


def _keys(record: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """(branch, name in the record) of what a step says about ``name``."""
    own = [(branch, f"{name}_{branch}") for branch in ("general", "domain") if f"{name}_{branch}" in record]
    return own if own and record["branch"] == "mixed" else [(record["branch"], name)]


def _value(record: dict[str, Any], name: str) -> float:
    value = number(record[name])
    return math.nan if value is None else value


def _series(points: dict[str, list[tuple[int, float]]]) -> list[Series]:
    made = []
    for variant in _order(points):
        pairs = np.array(points[variant], dtype=np.float64).reshape(-1, 2)
        if np.isfinite(pairs[:, 1]).any():
            made.append(Series(variant, pairs[:, 0], pairs[:, 1]))
    return made


def _order(branches: Iterable[str]) -> list[str]:
    """Those there are, known ones first."""
    there = set(branches)
    return [branch for branch in BRANCHES if branch in there] + sorted(there - set(BRANCHES))
