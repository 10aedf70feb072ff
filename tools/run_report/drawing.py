"""Drawings of values over the steps, whatever they are.

One run: a colour a branch. Several runs: a colour a run, a kind of line a branch. Points of steps of different branches
are never joined: each branch has lines of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tools.run_report.branches import MIXED, colour_and_line, in_order, pairs
from tools.run_report.figures import AXIS, INK, PALETTE, STYLE, label, legend, new_figure, shortened
from tools.run_report.reading import Run
from tools.run_report.series import (
    ALL,
    MOST_POINTS,
    Series,
    running_mean,
    skipped_steps,
    thinned,
)

LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)), (0, (1, 4)), (0, (5, 1, 1, 1, 1, 1)))
SMOOTHED_FROM = 80  # points of a line; below that every step is seen as it is
MARKED_TO = 60
ROUND = (1, 2, 2.5, 5, 10)  # distances of ticks
LEAST_SPAN = 2e-3  # of the y axis, relative to the values
LOGARITHMIC_FROM = 100.0  # largest / smallest value


class Plot(NamedTuple):
    """A figure of the page. name: of its file and in the page; caption: one sentence with the units."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Curve:
    """One figure over the steps.

    source: the series of a run. unit: what the y axis says. percent: values are fractions, shown times 100. wide: the
    y axis turns logarithmic where the values, all positive, span more than LOGARITHMIC_FROM. level: a value worth a
    line across. skipped: mark the steps that changed nothing.
    """

    name: str
    title: str
    unit: str
    caption: str
    source: Callable[[Run], list[Series]]
    percent: bool = False
    wide: bool = False
    level: float | None = None
    skipped: bool = False


def draw(curve: Curve, runs: Sequence[Run]) -> Plot | None:
    """The figure of ``curve``; None where no run has a value for it."""
    found = [(place, series) for place, run in enumerate(runs) for series in curve.source(run)]
    if not found:
        return None
    if curve.percent:
        found = [(place, Series(each.variant, each.steps, 100 * each.values)) for place, each in found]
    figure, axes = new_figure()
    with matplotlib.rc_context(STYLE):
        if curve.wide and _spans_decades([series.values for _, series in found]):
            axes.set_yscale("log")
        elif curve.level is not None:
            axes.axhline(curve.level, color=AXIS, linewidth=0.9)
        windows = [_draw_line(axes, series, look(runs, place, series.variant)) for place, series in found]
        marks = _mark_skipped(axes, runs) if curve.skipped else []
        finish_steps(axes)
        _widen_if_flat(axes, [series.values for _, series in found])
    label(axes, x="Step", y=curve.unit)
    _legend(figure, runs, found, marks)
    window = max(windows)
    caption = curve.caption + (f" Thin: every step; thick: mean over up to {window} points." if window > 1 else "")
    return Plot(curve.name, curve.title, caption, figure)


def finish_steps(axes: Axes) -> None:
    """Whole steps on the x axis; large and small numbers on the y axis without an offset to be added in one's head."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())


def look(runs: Sequence[Run], place: int, variant: str) -> dict[str, Any]:
    """Colour and kind of line of a series of run ``place``; variant: a branch, mixed, a pair of branches, or ALL."""
    names = _branches(runs)
    of_pairs = list(pairs(names))
    if variant == ALL:
        colour = rank = line = 0
    elif variant in of_pairs:
        rank = of_pairs.index(variant)
        line, colour = divmod(rank, len(PALETTE))
    else:
        rank = names.index(variant) if variant in names else len(names)
        colour, line = colour_and_line(variant, names)
    if len(runs) > 1:
        colour, line = place, rank
    return {"color": PALETTE[colour], "linestyle": LINES[line % len(LINES)]}


def _branches(runs: Sequence[Run]) -> list[str]:
    return in_order(name for run in runs for name in run.branches)


def _draw_line(axes: Axes, series: Series, appearance: dict[str, Any]) -> int:
    """Draw a series; returns how many points its thick line averages, 1 where every point is drawn as it is."""
    count = len(series.values)
    window = 1 + 2 * (count // 40) if count >= SMOOTHED_FROM else 1
    marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if count <= MARKED_TO else {}
    if window > 1:
        axes.plot(*thinned(series.steps, series.values), color=appearance["color"], linewidth=0.6, alpha=0.4)
    most = MOST_POINTS // 5 if window > 1 else MOST_POINTS  # a mean over many points has no spikes
    axes.plot(*thinned(series.steps, running_mean(series.values, window), most), **appearance, **marker)
    return window


def _spans_decades(values: Sequence[np.ndarray]) -> bool:
    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite)]
    return bool(finite.min() > 0 and finite.max() > LOGARITHMIC_FROM * finite.min())


def _widen_if_flat(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """Limits of the y axis under which values that are all but equal look it, and ticks differ in what is written."""
    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    middle = (low + high) / 2
    least = abs(middle) * (0.2 if low == high else LEAST_SPAN)
    if low == high == 0:
        axes.set_ylim(-0.05, 1.0)
    elif high - low < least:
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _mark_skipped(axes: Axes, runs: Sequence[Run]) -> list[Line2D]:
    """A cross at the lower edge for each skipped step; in the legend once."""
    marks = []
    for place, run in enumerate(runs):
        steps = np.array(skipped_steps(run)[:: max(1, len(skipped_steps(run)) // 500)])
        if len(steps):
            colour = PALETTE[place] if len(runs) > 1 else INK
            mark: dict[str, Any] = {"color": colour, "marker": "x", "markersize": 5, "linestyle": "none"}
            axes.plot(steps, np.full(len(steps), 0.02), transform=axes.get_xaxis_transform(), clip_on=False, **mark)
            marks = [Line2D([], [], **{**mark, "color": INK}, label="skipped step")]
    return marks


def _legend(figure: Figure, runs: Sequence[Run], found: Sequence[tuple[int, Series]], marks: Sequence[Line2D]) -> None:
    """Runs by colour, branches by kind of line; one run: branches by colour. Nothing to tell apart: no legend."""
    places = sorted({place for place, _ in found})
    there = {series.variant for _, series in found}
    names = _branches(runs)
    variants = [variant for variant in [*names, MIXED, *pairs(names)] if variant in there]
    handles = []
    if len(runs) > 1:
        handles += [Line2D([], [], color=PALETTE[place], label=shortened(runs[place].label)) for place in places]
        looks = [{"color": INK, "linestyle": look(runs, 0, variant)["linestyle"]} for variant in variants]
    else:
        looks = [look(runs, 0, variant) for variant in variants]
    handles += [
        Line2D([], [], **appearance, label=variant) for appearance, variant in zip(looks, variants, strict=True)
    ]
    handles += marks
    legend(figure, handles, [str(handle.get_label()) for handle in handles])
