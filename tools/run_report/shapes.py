"""The figures that are no curves over steps: Lorenz curves, norms of samples, time a phase, scores."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter

from tools.run_report.drawing import Plot, finish_steps, look
from tools.run_report.figures import AXIS, PALETTE, SIZE, STYLE, label, legend, new_figure, shortened
from tools.run_report.reading import Run, Scores, phase_seconds
from tools.run_report.series import lorenz_curves, phases_of, sample_norms

MOST_BUCKETS = 200  # along the x axis of the time per phase
BINS = 24
RECOVERED = "recovered"  # in scores: the model that the run made; all others are models it is compared with


def lorenz(runs: Sequence[Run]) -> Plot | None:
    """Lorenz curve of the latest measured step of each branch."""
    curves = [(place, branch, *found) for place, run in enumerate(runs) for branch, found in lorenz_curves(run).items()]
    if not curves:
        return None
    figure, axes = new_figure()
    with matplotlib.rc_context(STYLE):
        axes.plot([0, 100], [0, 100], color=AXIS, linewidth=0.9)
        for place, branch, step, curve, gini in curves:
            name = f"{branch}, step {step}"
            if len(runs) > 1:
                name = f"{shortened(runs[place].label, 24)}: {name}"
            axes.plot(
                np.linspace(0, 100, len(curve)),
                100 * np.array(curve),
                **look(runs, place, branch),
                label=name if gini is None else f"{name} (Gini {gini:.2f})",
            )
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 102)
    label(axes, x="Samples, largest first (%)", y="Gap mass (%)")
    legend(figure, axes)
    caption = (
        "Percentage of all gap scores carried by the samples with the largest ones, at each branch's latest measured"
        " step; the straight line: every sample carries the same."
    )
    return Plot("lorenz", "How the gap is spread over samples", caption, figure)


def norms_of_samples(runs: Sequence[Run]) -> Plot | None:
    """Quartiles of the norms over the steps of a branch; where no branch has three, histograms of the last."""
    several = len(runs) > 1
    measured = [(place, *found) for place, run in enumerate(runs) for found in sample_norms(run).items()]
    if not measured:
        return None
    figure, axes = new_figure()
    over_steps = max(len(found) for _, _, found in measured) >= 3
    with matplotlib.rc_context(STYLE):
        for place, branch, found in measured:
            name = f"{shortened(runs[place].label, 24)}: {branch}" if several else branch
            appearance = look(runs, place, branch)
            if over_steps:
                steps = [step for step, _ in found]
                low, middle, high = np.array([np.quantile(norms, (0.25, 0.5, 0.75)) for _, norms in found]).T
                axes.plot(steps, middle, **appearance, label=name, marker="o", markersize=2.5)
                axes.fill_between(steps, low, high, color=appearance["color"], alpha=0.15, linewidth=0)
            else:
                axes.hist(found[-1][1], bins=BINS, **appearance, histtype="step", label=f"{name}, step {found[-1][0]}")
        if over_steps:
            finish_steps(axes)
    if over_steps:
        label(axes, x="Step", y="Norm")
        caption = "Norms of single samples' gradients (gradient units): median (line) and quartiles (band)."
    else:
        label(axes, x="Norm", y="Samples")
        caption = "Number of samples by the norm of their gradient (gradient units), at each latest measured step."
    legend(figure, axes)
    return Plot("sample-norms", "Norms of samples' gradients", caption, figure)


def time_per_phase(runs: Sequence[Run]) -> Plot | None:
    """Seconds of each phase: stacked over the steps of one run, a stacked bar each for the mean step of several."""
    phases = phases_of(runs)
    if not phases:
        return None
    if len(runs) > 1:
        return _mean_time(runs, phases)
    seconds = np.array([[phase_seconds(record).get(phase, 0.0) for phase in phases] for record in runs[0].records])
    steps = np.array([record["step"] for record in runs[0].records], dtype=np.float64)
    buckets = np.array_split(np.arange(len(steps)), min(len(steps), MOST_BUCKETS))
    heights = np.array([seconds[bucket].mean(axis=0) for bucket in buckets])
    starts = np.array([steps[bucket[0]] for bucket in buckets])
    edges = np.append(starts, steps[-1] + 1) - 0.5
    figure, axes = new_figure()
    with matplotlib.rc_context(STYLE):
        below = np.zeros(len(buckets))
        for place, phase in enumerate(phases):
            top = below + heights[:, place]
            axes.stairs(top, edges, baseline=below, fill=True, color=_phase_colour(place), label=phase)
            below = top
        axes.set_ylim(bottom=0)
        finish_steps(axes)
    label(axes, x="Step", y="Seconds")
    legend(figure, axes)
    averaged = f", means of about {len(steps) // len(buckets)} steps" if len(steps) > len(buckets) else ""
    return Plot(
        "time",
        "Time per phase",
        f"Seconds that each phase of a step took, stacked{averaged}; phases below 0.1 % are left out.",
        figure,
    )


def _mean_time(runs: Sequence[Run], phases: Sequence[str]) -> Plot:
    figure, axes = new_figure((SIZE[0], max(SIZE[1], 1.6 + 0.42 * len(runs))))
    rows = np.arange(len(runs))
    with matplotlib.rc_context(STYLE):
        left = np.zeros(len(runs))
        for place, phase in enumerate(phases):
            means = np.array([np.mean([phase_seconds(r).get(phase, 0.0) for r in run.records]) for run in runs])
            axes.barh(rows, means, left=left, height=0.6, color=_phase_colour(place), label=phase)
            left += means
        axes.set_yticks(rows, [shortened(run.label, 18) for run in runs])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    axes.set_xlabel("Seconds per step")
    legend(figure, axes)
    return Plot(
        "time",
        "Time per phase",
        "Seconds of each phase in the mean step of each run, stacked; phases below 0.1 % are left out.",
        figure,
    )


def _phase_colour(place: int) -> str:
    order = (4, 0, 2, 3, 1, 5, 6)
    return PALETTE[order[place % len(order)]]


def scored_models(runs: Sequence[Run]) -> Scores:
    """Name -> test -> score, the models that several runs are compared with once.

    A name carries the run's label where it is needed to tell runs apart.
    """
    found: Scores = {}
    for run in runs:
        for model, tests in run.scores.items():
            if len(runs) == 1:
                found[model] = tests
            elif model == RECOVERED:
                found[run.label] = tests
            elif all(model not in other.scores or other.scores[model] == tests for other in runs):
                found.setdefault(model, tests)
            else:
                found[f"{run.label}: {model}"] = tests
    return found


def scores(runs: Sequence[Run]) -> Plot | None:
    """Scores of the evaluated models as bars, one group a test."""
    models = scored_models(runs)
    tests = list(dict.fromkeys(test for values in models.values() for test in values))
    if not tests:
        return None
    figure, axes = new_figure((SIZE[0], max(SIZE[1], 1.2 + 0.24 * len(models) * len(tests))))
    height = 0.8 / len(models)
    # A run has the colour that it has in the other figures; what it is compared with takes the rest from the end.
    own = [run.label for run in runs] if len(runs) > 1 else [RECOVERED]
    others = [model for model in models if model not in own]
    colours = {model: PALETTE[place % len(PALETTE)] for place, model in enumerate(own)}
    colours |= {model: PALETTE[-1 - place % len(PALETTE)] for place, model in enumerate(others)}
    with matplotlib.rc_context(STYLE):
        for place, (model, values) in enumerate(models.items()):
            rows = np.arange(len(tests)) - 0.4 + height * (place + 0.5)
            percent = [100 * values.get(test, np.nan) for test in tests]
            bars = axes.barh(rows, percent, height=0.86 * height, color=colours[model], label=shortened(model))
            axes.bar_label(bars, [f"{value:.1f}" if np.isfinite(value) else "" for value in percent], padding=3)
        axes.set_yticks(range(len(tests)), [shortened(test, 24) for test in tests])
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    axes.set_xlabel("Score (%)")
    legend(figure, axes)
    return Plot("scores", "Scores", "Scores of the models in each test, in percent; 100 is best.", figure)
