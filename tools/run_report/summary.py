"""The summary of a run in numbers: the cards at the top of the page and the table of runs.

Final values are means over the last LAST steps of a branch, since single steps see different prompts.
"""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from tools.run_report.branches import GAP, MIXED, in_order, pairs
from tools.run_report.json_values import number
from tools.run_report.reading import Run, phase_seconds
from tools.run_report.series import by_branch, by_pair, last_mean, phases_of, skipped_steps
from tools.run_report.shapes import RECOVERED

LAST = 5
NOTHING = "–"
LONGEST_CYCLE = 12  # turns of a schedule that are written out
FINAL = (  # metric, what the table calls it, factor, form
    ("loss", "Loss", 1, ".4g"),
    ("gap_abs_mean", "|gap| (nats)", 1, ".4g"),
    ("reverse_kl", "Reverse KL (nats)", 1, ".4g"),
    ("entropy_mean", "Entropy (nats)", 1, ".4g"),
    ("response_length_mean", "Response length (tokens)", 1, ",.1f"),
)
MEANS = (
    ("selected_fraction", "Selected samples (%)", 100, ".1f"),
    ("kept_token_fraction", "Kept tokens (%)", 100, ".1f"),
    ("acceptance_rate", "Accepted tokens (%)", 100, ".1f"),
    ("truncated_fraction", "Truncated responses (%)", 100, ".1f"),
    ("gradient_coherence_gain", "Gradient coherence gain (%)", 1, "+.1f"),
)


def cards(run: Run) -> list[tuple[str, str, str]]:
    """(heading, value, remark) of the numbers that matter most in one run."""
    found = [("Steps", f"{len(run.records):,}", schedule(run))]
    for series in by_branch(run, "gap_abs_mean"):
        final = last_mean(series, LAST)
        first = next(value for value in series.values.tolist() if value == value)
        found.append((f"|gap|, {series.variant}", _form(final, ".3g"), f"nats; {first:.3g} at its first step"))
    for test, value in run.scores.get(RECOVERED, {}).items():
        others = ", ".join(
            f"{name} {100 * tests[test]:.1f}"
            for name, tests in run.scores.items()
            if name != RECOVERED and test in tests
        )
        found.append((f"Score, {test}", f"{100 * value:.1f} %", others))
    seconds, tokens = total_seconds(run), total(run, "tokens")
    if seconds:
        found.append(("Time in steps", duration(seconds), _share(run, seconds)))
    if tokens is not None:
        rate = f"{tokens / seconds:,.0f} a second" if seconds else ""
        found.append(("Tokens", compact(tokens), rate))
    if skipped := len(skipped_steps(run)):
        found.append(("Skipped steps", f"{skipped:,}", "loss or gradient not finite"))
    return found


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: one column a run; rows that no run can fill are left out."""
    rows = [
        ["Folder", *(str(run.folder) for run in runs)],
        ["Model", *(run.model or NOTHING for run in runs)],
        ["Schedule", *(schedule(run) for run in runs)],
        ["Steps", *(f"{len(run.records):,}" for run in runs)],
        ["Skipped steps", *(f"{len(skipped_steps(run)):,}" for run in runs)],
    ]
    for metric, name, factor, form in FINAL:
        rows += _rows_of(runs, metric, f"{name}, last {LAST} steps", factor, form, LAST)
    for metric, name, factor, form in MEANS:
        rows += _rows_of(runs, metric, f"{name}, mean", factor, form, None)
    rows += _rows_of_pairs(runs)
    tests = dict.fromkeys(test for run in runs for test in run.scores.get(RECOVERED, {}))
    for test in tests:
        values = [run.scores.get(RECOVERED, {}).get(test) for run in runs]
        rows.append([f"Score, {test} (%)", *(_form(value, ".1f", 100) for value in values)])
    for metric, name in (("tokens", "Tokens"), ("trained_tokens", "Response tokens trained on")):
        rows.append([name, *(_form(total(run, metric), ",.0f") for run in runs)])
    rows.append(["Time in steps", *(duration(seconds) if (seconds := total_seconds(r)) else NOTHING for r in runs)])
    for phase in phases_of(runs):
        rows.append([f"Time in {phase}", *(_phase_share(run, phase) for run in runs)])
    rows.append(["Tokens per second", *(_form(throughput(run), ",.0f") for run in runs)])
    peaks = [max(values_of(run, "peak_memory_gib"), default=None) for run in runs]
    rows.append(["Peak memory (GiB)", *(_form(peak, ".2f") for peak in peaks)])
    for metric, name in (("prompts_truncated", "Prompts cut to length"), ("prompts_skipped", "Prompts skipped")):
        rows.append([name, *(_form(latest(run, metric), ",.0f") for run in runs)])
    return ["Quantity", *(run.label for run in runs)], [row for row in rows if set(row[1:]) != {NOTHING}]


def schedule(run: Run) -> str:
    """The order of the branches as it was: ``general x 3, domain x 1``, or what else can be said in a few words."""
    turns = [(branch, len(list(group))) for branch, group in groupby(run.records, key=lambda record: record["branch"])]
    if len(turns) == 1:
        return f"{turns[0][0]} only" if turns[0][0] != MIXED else _mixed_steps(run)
    is_gapless = run.records[-1]["step"] - run.records[0]["step"] == len(run.records) - 1
    if is_gapless and (cycle := _cycle(turns)):
        return ", ".join(f"{branch} × {count}" for branch, count in cycle)
    counts = {branch: sum(count for name, count in turns if name == branch) for branch in dict(turns)}
    return ", ".join(f"{count} {branch}" for branch, count in counts.items()) + " steps"


def _mixed_steps(run: Run) -> str:
    """Say in words which branches the steps of a run mix that has no other steps."""
    if len(run.branches) <= 2:
        return "both branches in every step"
    everywhere = all(f"{GAP}{branch}" in record for record in run.records for branch in run.branches)
    return f"{'all' if everywhere else 'several'} of {', '.join(run.branches)} in every step"


def _cycle(turns: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    """Return the shortest sequence of turns that ``turns`` repeat, the last of them perhaps unfinished; or nothing.

    A branch with several turns in it counts only if the sequence was seen twice: any order repeats itself once.
    """
    for period in range(2, min(len(turns), LONGEST_CYCLE) + 1):
        cycle = turns[:period]
        once_each = len({branch for branch, _ in cycle}) == period
        wanted = [cycle[place % period] for place in range(len(turns))]
        last, last_wanted = turns[-1], wanted[-1]
        repeats = list(turns[:-1]) == wanted[:-1] and last[0] == last_wanted[0] and last[1] <= last_wanted[1]
        if repeats and (once_each or len(turns) >= 2 * period):
            return cycle
    return ()


def values_of(run: Run, metric: str) -> list[float]:
    """The finite values over all steps."""
    return [value for record in run.records if (value := number(record.get(metric))) is not None]


def total(run: Run, metric: str) -> float | None:
    """Return the sum of ``metric`` over the steps that have it, None where none has."""
    values = values_of(run, metric)
    return sum(values) if values else None


def mean(run: Run, metric: str) -> float | None:
    """Return the mean of ``metric`` over the steps that have it, None where none has."""
    values = values_of(run, metric)
    return fmean(values) if values else None


def latest(run: Run, metric: str) -> float | None:
    """Sum over the branches of each one's latest value: these counters run on."""
    own = {record["branch"]: value for record in run.records if (value := number(record.get(metric))) is not None}
    return sum(own.values()) if own else None


def total_seconds(run: Run) -> float:
    """Return the seconds spent in the phases of all steps."""
    return sum(sum(phase_seconds(record).values()) for record in run.records)


def throughput(run: Run) -> float | None:
    """Return tokens a second over all steps, None where either is unknown."""
    tokens, seconds = total(run, "tokens"), total_seconds(run)
    return tokens / seconds if tokens is not None and seconds else None


def duration(seconds: float) -> str:
    """Like ``3 h 25 min``, ``4 min 10 s``, ``12.3 s``."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"


def compact(value: float) -> str:
    """Like ``1.23 M``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _rows_of(
    runs: Sequence[Run], metric: str, name: str, factor: float, form: str, last: int | None
) -> list[list[str]]:
    """A row for each branch that any run has ``metric`` of."""
    found = [{series.variant: series for series in by_branch(run, metric)} for run in runs]
    rows = []
    for branch in in_order(variant for own in found for variant in own):
        values = [last_mean(own[branch], last or len(own[branch].values)) if branch in own else None for own in found]
        if any(value is not None for value in values):
            rows.append([f"{name}: {branch}", *(_form(value, form, factor) for value in values)])
    return rows


def _rows_of_pairs(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each pair of branches whose gradients any run compared; the only pair of all runs needs no name."""
    labels = list(pairs(in_order(branch for run in runs for branch in run.branches)))
    found = [{series.variant: series for series in by_pair(run, "branch_cosine")} for run in runs]
    rows = []
    for label in labels:
        values = [last_mean(own[label], len(own[label].values)) if label in own else None for own in found]
        name = "Cosine of branches, mean" if len(labels) == 1 else f"Cosine of branches, mean: {label}"
        rows.append([name, *(_form(value, "+.3f") for value in values)])
    return rows


def _form(value: float | None, form: str, factor: float = 1) -> str:
    return NOTHING if value is None else f"{value * factor:{form}}"


def _phase_share(run: Run, phase: str) -> str:
    own = sum(phase_seconds(record).get(phase, 0.0) for record in run.records)
    whole_time = total_seconds(run)
    return f"{duration(own)} ({own / whole_time:.0%})" if whole_time else NOTHING


def _share(run: Run, seconds: float) -> str:
    own = sum(phase_seconds(record).get("rollout", 0.0) for record in run.records)
    return f"{own / seconds:.0%} of it rollouts" if own else ""
