"""The report of training runs: which sections it has, and in which order; empty ones are left out."""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from tools.run_report import curves, page, sample_cards, shapes, summary
from tools.run_report.branches import FIRST, in_order
from tools.run_report.drawing import Curve, Plot, draw
from tools.run_report.figures import png_bytes, svg_text
from tools.run_report.reading import METRICS_FILE, Run

Draw = Callable[[Sequence[Run]], Plot | None]

RECOVERY = (
    "In a general step the student learns from the general teacher, on prompts that recover general abilities; in a "
    "domain step from the specialist it was made from, on prompts of the domain. Gaps and losses of the two branches "
    "are measured against different teachers: compare each with itself over time."
)
BRANCHES = (
    "Each branch has prompts and a teacher of its own: {names}. Gaps and losses of branches are measured against "
    "different teachers: compare each with itself over time."
)


class Section(NamedTuple):
    """A section of the page."""

    heading: str
    name: str
    intro: str
    draws: tuple[Draw, ...]


class Rendered(NamedTuple):
    """page: HTML; images: file name -> PNG."""

    page: str
    images: dict[str, bytes]


def _of(table: Sequence[Curve]) -> tuple[Draw, ...]:
    return tuple(partial(draw, curve) for curve in table)


SECTIONS = (
    Section(
        "Outcome",
        "outcome",
        "Scores, where an evaluation is there, and how far student and teachers are apart.",
        (shapes.scores, *_of(curves.OUTCOME)),
    ),
    Section(
        "Selection and concentration",
        "selection",
        "Which samples and tokens were trained on, and how unevenly the gap is spread over the samples.",
        (*_of(curves.SELECTION), shapes.lorenz, partial(draw, curves.GINI)),
    ),
    Section(
        "Gradients of samples and branches",
        "gradients",
        "Measured on some samples of some steps, before the update.",
        (*_of(curves.GRADIENTS), shapes.norms_of_samples),
    ),
    Section(
        "Rollouts",
        "rollouts",
        "Responses, and how far the policy that sampled them is from the one that is trained.",
        _of(curves.ROLLOUTS),
    ),
    Section("Time and tokens", "cost", "", (shapes.time_per_phase, *_of(curves.COST))),
    Section("Optimizer", "optimizer", "", _of(curves.OPTIMIZER)),
)


def render(runs: Sequence[Run], title: str | None = None) -> Rendered:
    """The page about ``runs`` and its figures as PNG files."""
    total = sum(len(section.draws) for section in SECTIONS)
    images: dict[str, bytes] = {}
    sections: list[tuple[str, str]] = []
    shown: list[tuple[str, str]] = []
    with tqdm(total=total, desc="figures", unit="figure", disable=None, leave=False) as progress:
        for section in SECTIONS:
            figures = []
            for make in section.draws:
                if (plot := make(runs)) is not None:
                    figures.append(page.figure(svg_text(plot.figure, plot.name, plot.title), plot.title, plot.caption))
                    images[f"{plot.name}.png"] = png_bytes(plot.figure)
                progress.update()
            if figures:
                shown.append((section.name, section.heading))
                made = page.section(section.heading, section.name, [page.figures(figures)], section.intro)
                sections.append((section.name, made))
    header, rows = summary.comparison(runs)
    numbers = "Runs compared" if len(runs) > 1 else "All numbers"
    overview = [page.cards(summary.cards(runs[0]))] if len(runs) == 1 else []
    table = page.section(numbers, "numbers", [page.table(header, rows, _table_caption())])
    notes = [note for run in runs for note in run.notes]
    closing = [page.section("Notes", "notes", [page.paragraphs(notes)])] if notes else []
    samples = sample_cards.section(runs)
    after = [*([("samples", "Samples")] if samples else []), *([("notes", "Notes")] if notes else [])]
    places = [("numbers", numbers), *shown, *after]
    figures_first = [html for _, html in sections]
    body = [*overview, table, *figures_first] if len(runs) > 1 else [*overview, *figures_first, table]
    if len(runs) == 1:
        places = [*shown, ("numbers", numbers), *after]
    lead = [page.paragraphs([*map(_about, runs), _background(runs)]), page.navigation(places)]
    parts = [*body, *([samples] if samples else []), *closing]
    style = sample_cards.style(runs) if samples else ""
    return Rendered(page.document(title or _title(runs), lead, parts, style), images)


def _title(runs: Sequence[Run]) -> str:
    return f"Training run: {runs[0].label}" if len(runs) == 1 else f"Training runs: {', '.join(r.label for r in runs)}"


def _background(runs: Sequence[Run]) -> str:
    names = in_order(branch for run in runs for branch in run.branches)
    return RECOVERY if set(names) <= set(FIRST) else BRANCHES.format(names=", ".join(names))


def _about(run: Run) -> str:
    """One line about what was run."""
    path = run.folder / METRICS_FILE
    written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    first, last = run.records[0]["step"], run.records[-1]["step"]
    model = f"{run.model}; " if run.model else ""
    return f"{run.label}: {model}steps {first:,} to {last:,}, {summary.schedule(run)}; {path}, last written {written}."


def _table_caption() -> str:
    return (
        f"Values of the last {summary.LAST} steps are means over that many steps of the branch; times are of all "
        "steps, rank 0; – where nothing was recorded."
    )
