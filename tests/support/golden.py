"""The golden curve of the demo."""

from pathlib import Path

CURVE = Path(__file__).parents[1].joinpath("golden", "demo_curve.json")


FIGURES = ("loss", "gap_abs_mean", "response_length_mean", "selected_fraction", "grad_norm")
