"""The report of a run: a JSON document with every single time, and the same figures as Markdown tables."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.benchmark_report import NOT_MEASURED as NOT_MEASURED
from tools.benchmark_report import hardware, number, origin, origin_lines, replace, table
from tools.head_benchmark.contestants import CONTESTANTS, Contestant, installed_versions
from tools.head_benchmark.measure import MEASURED, Result
from tools.head_benchmark.problem import Case

COLUMNS = (
    "contestant", "median ms", "min ms", "x materialised", "x products", "peak extra MiB", "% of materialised",
    "log-prob error max", "mean", "dX error", "dW error", "remark",
)  # fmt: skip
LEGEND = """\
Times are of one call; the contestants took turns. x materialised, x products: ratio of the medians in this run.
Peak extra: memory beyond what existed before the call; in training one fp32 buffer of the weight's shape, for its
gradient, is free for everybody. Log-prob error: nats, against float64. dX, dW error: norm of the difference to the
float64 gradient over that gradient's norm, on sampled rows."""


def document(flags: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON document with the origin of the run and no cases yet."""
    machine = hardware(settings["device"], settings["threads"])
    head = origin(["python", "tools/benchmark_head.py", *flags], machine, installed_versions())
    return {**head, "settings": settings, "cases": []}


def case_record(case: Case, results: Sequence[Result], memory_method: str) -> dict[str, Any]:
    """Return one entry of ``document["cases"]``: the results with medians and ratios (None: not measured)."""
    return {**dataclasses.asdict(case), "memory_method": memory_method, "results": with_ratios(results)}


def with_ratios(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the results as records, with median and minimum of the seconds, and ratios.

    The ratios are within a mode: median time over that of ``materialised`` and of ``products``, peak memory over that
    of ``materialised``.
    """
    records = []
    for result in results:
        seconds = result.seconds if result.status == MEASURED else []
        median = statistics.median(seconds) if seconds else None
        times = {"median_seconds": median, "min_seconds": min(seconds, default=None)}
        records.append({**dataclasses.asdict(result), **times})
    for record in records:
        rivals = {rival["contestant"]: rival for rival in records if rival["mode"] == record["mode"]}
        plain, floor = rivals.get("materialised", {}), rivals.get("products", {})
        record["time_over_materialised"] = _ratio(record, plain, "median_seconds")
        record["time_over_products"] = _ratio(record, floor, "median_seconds")
        record["peak_over_materialised"] = _ratio(record, plain, "peak_extra_bytes")
    return records


def markdown(report: dict[str, Any]) -> str:
    """Return the whole report: origin, one table per case and mode, and a description of the contestants."""
    lines = ["# Output head: time, memory, error", "", *origin_lines(report), "", LEGEND, ""]
    for case in report["cases"]:
        lines += [case_tables(case), ""]
    return "\n".join(lines + ["## Contestants", "", *map(_description, CONTESTANTS.values()), ""])


def case_tables(case: dict[str, Any]) -> str:
    """Return the tables of one case, one per mode, with their headings."""
    sizes = f"N {case['tokens']:,}, H {case['hidden']:,}, V {case['vocab']:,}, {case['dtype']}"
    sizes += f", tp {case['tp']}" if case["tp"] > 1 else ""
    sizes += f", temperature {case['temperature']}" if case["temperature"] != 1.0 else ""
    parts = []
    for mode in dict.fromkeys(record["mode"] for record in case["results"]):
        rows = [_row(record) for record in case["results"] if record["mode"] == mode]
        parts += [f"## {mode}: {sizes}", "", table([COLUMNS, *rows]), ""]
    return "\n".join([*parts, f"Memory: {case['memory_method']}."])


def write(report: dict[str, Any], json_path: Path | None, markdown_path: Path | None) -> None:
    """Write the files whose paths are given; a reader never sees a partly written file."""
    if json_path is not None:
        replace(json_path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if markdown_path is not None:
        replace(markdown_path, markdown(report))


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the table row of one record."""
    kind = CONTESTANTS.get(record["contestant"], Contestant)
    remark = record["status"] if record["status"] != MEASURED else ""
    if not remark and record["mode"] == "training" and not kind.weighted:
        remark = "plain cross-entropy sum"
    forward = record["mode"] == "forward"
    shown = (
        ("logprob_error_max", "logprob_error_mean") if forward else ("hidden_gradient_error", "weight_gradient_error")
    )
    # The products alone allocate nothing in the call, and their results have no reference.
    errors = ["" if kind.preallocates else number(record[name], "{:.1e}") for name in shown]
    return (
        record["contestant"],
        number(record["median_seconds"], "{:,.1f}", 1e3),
        number(record["min_seconds"], "{:,.1f}", 1e3),
        number(record["time_over_materialised"], "{:.3f}"),
        number(record["time_over_products"], "{:.3f}"),
        "" if kind.preallocates else number(record["peak_extra_bytes"], "{:,.1f}", 2.0**-20),
        "" if kind.preallocates else number(record["peak_over_materialised"], "{:.1f}", 100.0),
        *(errors + ["", ""] if forward else ["", ""] + errors),
        remark,
    )


def _description(contestant: Contestant) -> str:
    """Return the contestant's line in the report."""
    package = f" ({contestant.distribution}, written for {contestant.version})" if contestant.distribution else ""
    return f"* {contestant.name}{package}: {contestant.note}"


def _ratio(record: dict[str, Any], rival: dict[str, Any], name: str) -> float | None:
    """Return the record's value over that of ``rival``, None where either was not measured."""
    own, other = record[name], rival.get(name)
    return None if own is None or not other else own / other
