"""tools/report.py: what is read and refused, which values are drawn, the interval, and the page that comes out.

Runs are written here record by record, so that every expected number is known without the code under test.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_camopd.errors import ConfigurationError
from tools import report
from tools.run_report import figures, page, series, shapes, summary
from tools.run_report.curves import OPTIMIZER, OUTCOME, ROLLOUTS
from tools.run_report.drawing import Plot, draw
from tools.run_report.figures import band, mean_interval, new_figure, svg_text, t_quantile
from tools.run_report.reading import Run, read_metrics, read_runs, read_scores

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
GOOD = '{"step": 0, "branch": "general"}'
SCORES = {"general_teacher": {"general": 0.99}, "recovered": {"general": 0.9, "domain": 0.75}}


def record(step: int, branch: str = "general", **values: Any) -> dict[str, Any]:
    """Return what every step writes; the gap is known by step and branch."""
    gap = {"general": 2.0, "domain": 0.1, "mixed": 1.0}[branch] + step / 1000
    return {
        "step": step, "branch": branch, "loss": -gap, "grad_norm": 3.0, "learning_rate": 1e-4, "skipped": 0,
        "trained_tokens": 10, "selected_fraction": 0.5, "gap_mean": -gap, "gap_abs_mean": gap, "reverse_kl": gap,
        "importance_mean": 1.0, "importance_outside_fraction": 0.0, "rollout_train_logprob_abs_diff": 1e-6,
        "response_length_mean": 12.0, "truncated_fraction": 0.25, "tokens": 100, "time_sync": 0.0, "time_rollout": 3.0,
        "time_score": 1.0, "time_train": 1.0, "peak_memory_gib": 0.5, **values,
    }  # fmt: skip


def alternating(steps: int) -> list[dict[str, Any]]:
    return [record(step, "domain" if step % 4 == 3 else "general") for step in range(steps)]


DIAGNOSED = {
    "coherence_full": 0.2, "coherence_selected": 0.25, "gradient_coherence_gain": 25.0, "branch_dot_product": -0.5,
    "branch_cosine": -0.4, "general_grad_norm": 1.0, "domain_grad_norm": 2.0, "sample_grad_norms": [0.5, None, 1.5],
    "gap_lorenz": [1 - (1 - point / 20) ** 2 for point in range(21)], "gap_gini": 0.3, "time_diagnostics": 2.0,
}  # fmt: skip


def write_run(folder: Path, records: list[dict[str, Any]], end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + end, encoding="utf-8")
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    """A run of these records, read back from its file."""

    def made(records: list[dict[str, Any]], name: str = "run") -> Run:
        return read_runs([str(write_run(tmp_path / name / name, records))])[0]

    return made


class Reader(HTMLParser):
    """Collects tags with attributes, texts, and checks that elements are closed in order."""

    VOID = {"meta", "path", "use", "rect", "br", "hr", "img", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def lines_of(plot: Plot | None) -> Iterator[tuple[Any, list[float], list[float]]]:
    """(line, x, y) of the lines of a figure that follow data."""
    assert plot is not None
    for line in plot.figure.axes[0].get_lines():
        x, y = map(list, line.get_data())
        if len(x) > 2 or line.get_marker() in ("o", "x"):
            yield line, x, y


def curve(name: str) -> Any:
    return next(each for each in (*OUTCOME, *ROLLOUTS, *OPTIMIZER) if each.name == name)


# ---- reading


def test_cut_last_line_is_noted_and_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, alternating(3), end='\n{"step": 3, "bra')
    records, notes = read_metrics(tmp_path / "metrics.jsonl")
    assert [each["step"] for each in records] == [0, 1, 2]
    assert len(notes) == 1 and "line 4, is cut off" in notes[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"step": 1,', '{"step": 2, "branch": "general"}', ""], "line 2: is no JSON"),
        ([GOOD, '{"step": 1,', ""], "line 2: is no JSON"),
        (["[1]", ""], r"line 1: is \[1\]; it must be a JSON object"),
        (['{"branch": "general"}', ""], "line 1: 'step' is None; it must be a whole number"),
        (['{"step": true, "branch": "general"}', ""], "line 1: 'step' is True"),
        (['{"step": 0}', ""], "line 1: 'branch' is None; it must be general, domain or mixed"),
        (['{"step": 4, "branch": "domain"}', "", '{"step": 4, "branch": "domain"}', ""], "line 3: step 4 comes after"),
        ([""], "holds no steps"),
        (['{"step"'], "holds no steps"),
    ],
)  # fmt: skip
def test_broken_metrics_name_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_metrics(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "branch": "\xff"}\n')
    with pytest.raises(ConfigurationError, match="byte 23 is not UTF-8"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_nulls_are_counted_in_a_note(make: Callable[..., Run]) -> None:
    run = make([record(0), record(1, loss=None, skipped=1), record(2, loss=None)])
    assert any("loss (2)" in note for note in run.notes)


def test_runs_that_cannot_be_reported(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / folder / "run", alternating(2)) for folder in "ab")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "missing")], "missing is no folder"),
        ([str(tmp_path / "empty")], "empty holds no metrics.jsonl"),
        ([str(a), str(b)], "2 runs are called 'run'"),
        ([f"{name}={a}" for name in "12345678"], "8 runs are given; at most 7"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            read_runs(arguments)
    assert [run.label for run in read_runs([str(a), f"other={b}"])] == ["run", "other"]


def test_scores_are_found_beside_or_above_one_run_only(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, alternating(2)) for name in ("a", "b"))
    (tmp_path / "scores.json").write_text(json.dumps(SCORES), encoding="utf-8")
    assert read_runs([str(a)])[0].scores == SCORES
    both = read_runs([str(a), str(b)])
    assert [run.scores for run in both] == [{}, {}]  # whose they are, nobody knows
    assert all("may belong to any" in run.notes[0] for run in both)
    (b / "scores.json").write_text('{"recovered": {"domain": 0.5}}', encoding="utf-8")
    given = read_runs([str(a), str(b)], [f"a={tmp_path / 'scores.json'}"])
    assert [run.scores for run in given] == [SCORES, {"recovered": {"domain": 0.5}}]
    with pytest.raises(ConfigurationError, match="with several runs it must be LABEL=FILE"):
        read_runs([str(a), str(b)], [str(tmp_path / "scores.json")])
    with pytest.raises(ConfigurationError, match="no run is called 'c'; there are: a b"):
        read_runs([str(a), str(b)], ["c=scores.json"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[]", "holds no scores"), ('{"recovered": {"general": 90}}', "recovered, general is 90.0")],
)
def test_broken_scores(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        read_scores(tmp_path / "scores.json")


# ---- series


def test_branches_are_never_joined(make: Callable[..., Run]) -> None:
    run = make(alternating(12))
    drawn = {tuple(x): y for _, x, y in lines_of(draw(curve("gap"), [run]))}
    general, domain = [0, 1, 2, 4, 5, 6, 8, 9, 10], [3, 7, 11]
    assert drawn.keys() == {tuple(general), tuple(domain)}
    assert drawn[tuple(general)] == pytest.approx([2.0 + step / 1000 for step in general])
    assert drawn[tuple(domain)] == pytest.approx([0.1 + step / 1000 for step in domain])


def test_mixed_steps_give_to_both_branches_what_they_know_of_them(make: Callable[..., Run]) -> None:
    known = {"gap_abs_mean_general": 3.0, "gap_abs_mean_domain": 0.5, "gap_mean_general": -2.0, "gap_mean_domain": 0.25}
    run = make([record(step, "mixed", **known) for step in range(3)])
    gaps = {each.variant: each.values.tolist() for each in series.by_branch(run, "gap_abs_mean")}
    assert gaps == {"general": [3.0] * 3, "domain": [0.5] * 3}
    reverse = {each.variant: each.values.tolist() for each in series.by_branch(run, "reverse_kl")}
    assert reverse == {"general": [2.0] * 3, "domain": [-0.25] * 3}
    assert [each.variant for each in series.by_branch(run, "loss")] == ["mixed"]


def test_null_is_a_gap_in_the_line_and_skipped_steps_are_marked(make: Callable[..., Run]) -> None:
    run = make([record(0), record(1, loss=None, skipped=1), record(2)])
    (loss, marks) = lines_of(draw(curve("loss"), [run]))
    assert loss[2][0] == -2.0 and math.isnan(loss[2][1])
    assert marks[1] == [1] and marks[0].get_marker() == "x"
    assert [text.get_text() for text in draw(curve("loss"), [run]).figure.legends[0].get_texts()] == [  # type: ignore
        "general", "skipped step"]  # fmt: skip


def test_thinning_keeps_spikes_and_gaps() -> None:
    steps, values = np.arange(50_000.0), np.zeros(50_000)
    values[31_337], values[4_321], values[20_000:20_200] = 9.0, -7.0, np.nan
    x, y = series.thinned(steps, values)
    assert len(x) <= series.MOST_POINTS and (np.diff(x) > 0).all()
    assert (31_337, 9.0) in zip(x, y, strict=True) and (4_321, -7.0) in zip(x, y, strict=True)
    assert np.isnan(y).any() and np.isnan(y).sum() <= 4
    assert len(series.thinned(steps[:2000], values[:2000])[0]) == 2000


def test_running_mean() -> None:
    mean = series.running_mean(np.array([1.0, 2.0, np.nan, 6.0, 10.0]), 3)
    assert mean.tolist() == pytest.approx([1.5, 1.5, 4.0, 8.0, 8.0])
    assert np.isnan(series.running_mean(np.array([np.nan, np.nan, np.nan, 1.0]), 3)[:2]).all()


# ---- figures


@pytest.mark.parametrize(
    ("freedom", "confidence", "table"),  # of a printed table of Student's distribution, two-sided
    [
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.95, 2.571), (9, 0.95, 2.262),
        (10, 0.95, 2.228), (30, 0.95, 2.042), (120, 0.95, 1.980), (1, 0.99, 63.657), (4, 0.99, 4.604), (7, 0.9, 1.895),
    ],
)  # fmt: skip
def test_t_quantile(freedom: int, confidence: float, table: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(table, abs=5.1e-4)


def test_interval_ignores_missing_seeds() -> None:
    nan = math.nan
    mean, half = mean_interval([[1.0, 1.0, nan, 5.0], [2.0, nan, nan, 5.0], [6.0, 3.0, nan, 5.0]])
    # 1, 2, 6: deviations -2 -1 3, variance 14/2; 1, 3: variance 2
    assert mean[:2].tolist() == [3.0, 2.0] and math.isnan(mean[2])
    assert half[0] == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert half[1] == pytest.approx(12.7062 * math.sqrt(2 / 2), rel=1e-5)
    assert math.isnan(half[2]) and half[3] == 0.0
    assert np.isnan(mean_interval([[1.0, 2.0]])[1]).all()


def test_band_draws_mean_and_interval() -> None:
    figure, axes = new_figure()
    band(axes, [0, 10], [[1.0, 2.0], [3.0, 2.0]], "two seeds", figures.PALETTE[1])
    assert list(axes.get_lines()[0].get_ydata()) == [2.0, 2.0]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(2 + 12.7062, rel=1e-5) and heights.min() == pytest.approx(
        2 - 12.7062, rel=1e-5
    )


def test_svg_has_variables_for_colours_and_no_foreign_parts() -> None:
    def made() -> str:
        figure, axes = new_figure()
        axes.plot([0, 1], [0, 1], color=figures.PALETTE[0])
        figures.label(axes, x="Step", y="$5 & <b>")
        return svg_text(figure, "one", "A & B <i>")

    text = made()
    assert "var(--series-0)" in text and "var(--ink)" in text and "var(--grid)" in text
    assert not re.search(r"#[0-9a-f]{6}\b", text)
    assert "$5 &amp; &lt;b&gt;" in text and '<title id="one-title">A &amp; B &lt;i&gt;</title>' in text
    for foreign in ("<metadata", "<!DOCTYPE", "<?xml", "<style", "<script"):
        assert foreign not in text
    assert text == made()  # no date, no random names


def test_wide_positive_values_are_drawn_on_a_logarithmic_axis(make: Callable[..., Run]) -> None:
    def scale(*norms: float) -> str:
        plot = draw(curve("grad-norm"), [make([record(step, grad_norm=norm) for step, norm in enumerate(norms)])])
        assert plot is not None
        return plot.figure.axes[0].get_yscale()

    assert scale(0.01, 0.5, 2.0) == "log"
    assert scale(0.0, 0.5, 2.0) == "linear"  # zero would be lost
    assert scale(0.1, 0.5, 2.0) == "linear"


def test_values_that_hardly_differ_have_ticks_that_do(make: Callable[..., Run]) -> None:
    for values in ((1.0, 1.0 + 1e-9, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):
        run = make([record(step, importance_mean=value) for step, value in enumerate(values)])
        plot = draw(curve("importance-mean"), [run])
        assert plot is not None
        plot.figure.canvas.draw()
        texts = [text.get_text() for text in plot.figure.axes[0].get_yticklabels()]
        assert len(texts) > 2 and len(set(texts)) == len(texts)


def test_time_is_stacked(make: Callable[..., Run]) -> None:
    plot = shapes.time_per_phase([make(alternating(4))])
    assert plot is not None
    steps: list[Any] = list(plot.figure.axes[0].patches)
    tops = [patch.get_data().values.tolist() for patch in steps]
    assert tops == [[3.0] * 4, [4.0] * 4, [5.0] * 4]  # rollout, score, train; sync took no time


def test_lorenz_shows_the_latest_finite_curve_of_each_branch(make: Callable[..., Run]) -> None:
    straight, bent = [point / 20 for point in range(21)], DIAGNOSED["gap_lorenz"]
    run = make([
        record(0, gap_lorenz=straight), record(3, "domain", gap_lorenz=straight, gap_gini=0.0),
        record(4, gap_lorenz=bent, gap_gini=0.3), record(8, gap_lorenz=[None] * 21, gap_gini=None),
    ])  # fmt: skip
    assert series.lorenz_curves(run) == {"general": (4, bent, 0.3), "domain": (3, straight, 0.0)}


def test_scores_of_shared_models_appear_once(tmp_path: Path) -> None:
    runs = [Run(name, tmp_path, [record(0)], scores=dict(SCORES)) for name in "ab"]
    assert list(shapes.scored_models(runs)) == ["general_teacher", "a", "b"]
    runs[1].scores = {**SCORES, "general_teacher": {"general": 0.5}}
    assert list(shapes.scored_models(runs)) == ["a: general_teacher", "a", "b: general_teacher", "b"]


# ---- summary


def test_table_of_one_run(make: Callable[..., Run]) -> None:
    run = make(alternating(8) + [record(8, loss=None, skipped=1)])
    run.scores = SCORES
    header, rows = summary.comparison([run])
    values = {row[0]: row[1] for row in rows}
    assert header == ["Quantity", "run"]
    assert values["|gap| (nats), last 5 steps: general"] == f"{2 + (2 + 4 + 5 + 6 + 8) / 5000:.4g}"
    assert values["|gap| (nats), last 5 steps: domain"] == f"{0.1 + (3 + 7) / 2000:.4g}"
    assert values["Schedule"] == "general × 3, domain × 1"
    assert (values["Steps"], values["Skipped steps"], values["Tokens"]) == ("9", "1", "900")
    assert values["Time in steps"] == "45 s" and values["Time in rollout"] == "27 s (60%)"
    assert values["Tokens per second"] == "20" and values["Score, domain (%)"] == "75.0"
    assert not any("Kept" in name or "GCG" in name or "Cosine" in name for name in values)  # nothing to say


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ("gggdgggdg", "general × 3, domain × 1"), ("ggg", "general only"), ("mmm", "both branches in every step"),
        ("gdggd", "3 general, 2 domain steps"), ("dggdgg", "domain × 1, general × 2"),
    ],
)  # fmt: skip
def test_schedule_in_words(make: Callable[..., Run], branches: str, words: str) -> None:
    names = {"g": "general", "d": "domain", "m": "mixed"}
    assert summary.schedule(make([record(step, names[each]) for step, each in enumerate(branches)])) == words


def test_durations_and_large_numbers() -> None:
    assert [summary.duration(value) for value in (0.5, 12.34, 250, 12_300)] == [
        "0.5 s",
        "12.3 s",
        "4 min 10 s",
        "3 h 25 min",
    ]
    assert [summary.compact(value) for value in (950, 1_230_000, 7.54e9)] == ["950", "1.23 M", "7.54 B"]


# ---- the page and the command


def report_of(flags: list[str], output: Path) -> str:
    assert report.main(flags) == 0
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    return (output / "index.html").read_text(encoding="utf-8")


def assert_asks_for_nothing(html: str) -> None:
    found = Reader(html)
    policies = [tag["content"] for tag in found.named("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href", "action", "data", "poster", "srcset"):
                assert value is not None and value.startswith("#"), (name, value)
            assert not name.startswith("on")
    assert set(re.findall(r"url\((.)", html)) <= {"#"} and "@import" not in html
    assert set(re.findall(r'[\w:]*="https?://[^"]*"', html)) <= {
        'xmlns:xlink="http://www.w3.org/1999/xlink"', 'xmlns="http://www.w3.org/2000/svg"'}  # fmt: skip


def test_page_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{**each, **DIAGNOSED} if each["step"] % 3 == 0 else each for each in alternating(12)]
    run = write_run(tmp_path / "run", records)
    (tmp_path / "scores.json").write_text(json.dumps(SCORES), encoding="utf-8")
    html = report_of([str(run), "--title", "A <b> & c"], run / "report")
    assert capsys.readouterr().out == f"{run / 'report' / 'index.html'}\n"
    found = Reader(html)
    assert_asks_for_nothing(html)
    images = sorted((run / "report").glob("*.png"))
    assert len(images) == len(found.named("figure")) == len(found.named("figcaption")) == len(found.named("svg"))
    assert all(image.read_bytes().startswith(PNG) for image in images)
    names = {image.stem for image in images}
    assert {
        "loss", "gap", "reverse-kl", "importance-mean", "importance-outside", "mismatch", "response-length",
        "truncated", "selected-fraction", "coherence-gain", "coherence-full", "branch-dot-product", "branch-cosine",
        "lorenz", "sample-norms", "time", "tokens", "throughput", "learning-rate", "grad-norm", "scores",
    } <= names  # fmt: skip
    assert not {"entropy", "kept-tokens", "acceptance"} & names  # without data, without figure
    assert "A <b> & c" in found.text and "A <b>" not in html
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [tag["href"] for tag in found.named("a")] + [tag["xlink:href"] for tag in found.named("use")]
    targets += [f"#{tag['aria-labelledby']}" for tag in found.named("svg")] + re.findall(r"url\((#[^)]+)\)", html)
    assert targets and {target[1:] for target in targets if target} <= set(ids)
    assert all(tag.get("scope") in ("row", "col") for tag in found.named("th")) and found.named("th")
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_page_of_several_runs(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", alternating(6)), write_run(tmp_path / "b", [record(s, "mixed") for s in range(6)])
    output = tmp_path / "new" / "out"
    html = report_of([f"_$x$={a}", f"MOPD={b}", "--output", str(output)], output)
    assert_asks_for_nothing(html)
    found = Reader(html)
    assert "_$x$" in found.text and "MOPD" in found.text
    assert re.search(r"<text [^>]*> _\$x\$</text>", html)  # in legends neither left out nor taken for a formula
    heads = [tag for tag in found.named("th") if tag.get("scope") == "col"]
    assert len(heads) == 3 and (output / "time.png").is_file()


def test_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", alternating(6000))
    assert len(report_of([str(run)], run / "report")) < 2_500_000


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["{tmp}/nowhere"], "RUN: {tmp}/nowhere is no folder; it must be what a run's --save named\n"),
        (["{tmp}/a", "{tmp}/b"], "--output is not given; with several runs it must name the folder to write\n"),
        (["{tmp}/a", "--output", "{tmp}/a/metrics.jsonl"], "cannot be written"),
        (["{tmp}/a", "--scores", "{tmp}/none.json"], "{tmp}/none.json: cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    for name in "ab":
        write_run(tmp_path / name, alternating(2))
    assert report.main([flag.format(tmp=tmp_path) for flag in flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("report.py: error: ") and line.format(tmp=tmp_path) in captured.err
    assert captured.out == "" and captured.err.count("\n") == 1


def test_command_runs_from_anywhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", alternating(2))
    command = [sys.executable, str(ROOT / "tools" / "report.py"), "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "run/report/index.html\n"), done.stderr
    assert (run / "report" / "loss.png").is_file()


def test_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page.write(tmp_path / "file", "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        page.write(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
