"""The look of figures, and their way into a page: style, palette, mean with interval, inline SVG, PNG.

A figure is drawn once, in the colours of the light page. In its SVG each colour becomes a CSS variable, which the page
sets for light and for dark; text stays text, in the page's font. PNG files have a white background.

    figure, axes = new_figure()
    band(axes, steps, values_of_seeds, "CaMOPD", PALETTE[0])
    label(axes, x="Step", y="Score (%)"); legend(figure, axes)
    svg_text(figure, "scores", "Scores over steps"), png_bytes(figure)
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; of each a darker and a lighter version, for either page.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b65f90", "#3f9fd8", "#b87e00", "#6b6b6b")
PALETTE_ON_DARK = ("#5db4ec", "#ff9147", "#35c99b", "#e598c6", "#9ad7fb", "#f2bc4b", "#b3b3b3")
INK, AXIS, GRID = "#1f2328", "#8b949e", "#e3e6ea"
INK_ON_DARK, AXIS_ON_DARK, GRID_ON_DARK = "#e6edf3", "#7d8590", "#2f353d"

SIZE = (4.6, 2.85)  # inches; at 10 points its text can be read at the width of a telephone
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "text.color": INK, "axes.labelcolor": INK,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.color": AXIS, "ytick.color": AXIS, "axes.edgecolor": AXIS,
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "figure.facecolor": "white", "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "legend.frameon": False, "svg.fonttype": "none", "text.parse_math": False,
    "axes.formatter.use_mathtext": False, "path.simplify": True,
}  # fmt: skip

_VARIABLES = {
    **{colour: f"--series-{place}" for place, colour in enumerate(PALETTE)},
    INK: "--ink", AXIS: "--axis", GRID: "--grid",
}  # fmt: skip
_CHARACTERS_A_LINE = 56  # of legend text in a figure of SIZE


def colour_variables(*, dark: bool) -> str:
    """CSS declarations of the variables that :func:`svg_text` puts in the place of colours."""
    on_dark = (*PALETTE_ON_DARK, INK_ON_DARK, AXIS_ON_DARK, GRID_ON_DARK)
    return "; ".join(
        f"{name}: {other if dark else colour}"
        for (colour, name), other in zip(_VARIABLES.items(), on_dark, strict=True)
    )


def new_figure(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """An empty figure of ``size`` inches in the style, and its axes. No global state of matplotlib is touched."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()


def label(axes: Axes, *, x: str, y: str) -> None:
    """Label both axes."""
    with matplotlib.rc_context(STYLE):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.margins(x=0.02)


def legend(figure: Figure, handles: Sequence[Any] | Axes, labels: Sequence[str] | None = None) -> None:
    """A legend above the axes, in as many columns as its texts leave room for; nothing where there are none.

    handles: with ``labels``; or axes, whose labelled artists are taken.
    """
    if isinstance(handles, Axes):
        handles, labels = handles.get_legend_handles_labels()
    assert labels is not None and len(handles) == len(labels)
    if not labels:
        return
    texts = [shortened(text, 52) for text in labels]
    columns = max(1, min(len(texts), _CHARACTERS_A_LINE // (max(map(len, texts)) + 6)))
    with matplotlib.rc_context(STYLE):
        figure.legend(handles, texts, loc="outside upper left", ncols=columns, handlelength=2.0, columnspacing=1.2)


def shortened(text: str, most: int = 40) -> str:
    """``text`` for a legend: cut in the middle, and not beginning with _, which matplotlib would take for a secret."""
    cut = text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
    return f" {cut}" if cut.startswith("_") else cut


def band(axes: Axes, x: Sequence[float], values: Any, label: str, color: str, **line: Any) -> None:
    """The mean over seeds as a line, its 95 % interval as a band around it.

    x: [points]; values: [seeds, points] float, NaN where a seed has no value. Points that one seed alone has get no
    band, points without any leave a gap. ``line``: further arguments of ``axes.plot``.
    """
    mean, half = mean_interval(values)
    places: np.ndarray = np.asarray(x, dtype=np.float64)
    assert places.shape == mean.shape, (places.shape, mean.shape)
    with matplotlib.rc_context(STYLE):
        axes.plot(places, mean, label=shortened(label), color=color, **line)
        axes.fill_between(places, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)


def mean_interval(values: Any, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half the width of its t-interval: two arrays [points] float64.

    values: [seeds, points], NaN ignored. half = t_{n-1} s / sqrt(n) of a point's n values, s with n - 1; NaN where n
    is less than 2.
    """
    array = np.asarray(values, dtype=np.float64)
    assert array.ndim == 2, array.shape
    finite = np.isfinite(array)
    counts = finite.sum(axis=0)
    mean = np.where(counts > 0, np.where(finite, array, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)
    squares = np.where(finite, (array - mean) ** 2, 0.0).sum(axis=0)
    half = np.full(mean.shape, np.nan)
    for count in {int(count) for count in counts if count > 1}:
        own = counts == count
        half[own] = t_quantile(confidence, count - 1) * np.sqrt(squares[own] / (count - 1) / count)
    return mean, half


def t_quantile(confidence: float, freedom: int) -> float:
    """T with P(|T| < t) = ``confidence`` of Student's distribution with ``freedom`` >= 1 degrees of freedom."""
    assert 0.0 < confidence < 1.0 and freedom >= 1, (confidence, freedom)
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom))
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def t_probability(t: float, freedom: int) -> float:
    """P(|T| < ``t``) of Student's distribution with ``freedom`` >= 1 degrees of freedom; ``t`` >= 0."""
    assert t >= 0.0 and freedom >= 1, (t, freedom)
    return _t_inside(math.atan(t / math.sqrt(freedom)), freedom)


def _t_inside(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)): the finite series for whole degrees of freedom, in powers of the cosine."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * power / (power + 1)
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside


def svg_text(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element to be put into a page.

    name: of this figure alone in its page, [a-z0-9-]; title: what a screen reader says. Colours of PALETTE, INK, AXIS
    and GRID become variables (see :func:`colour_variables`).
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Names of parts would be there once a figure; what is referred to has names made from its content and the salt.
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _as_variable(found[0]), text)
    text = re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    text = re.sub(r'(\b[xy]="-?\d+\.\d\d)\d+"', r'\1"', text)
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None
    body = text[text.index(">") + 1 :]
    escaped = title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        f'<svg {head[0]} role="img" aria-labelledby="{name}-title" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{escaped}</title>{re.sub(r"\n\s*", "\n", body).strip()}'
    )


def _as_variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file on white, 920 pixels wide for SIZE."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
