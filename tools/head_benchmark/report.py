"""What a run leaves: a JSON document with every single time, and the same figures as a Markdown table."""

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
    """The head of the JSON document: where, when and with what a run was made. ``cases`` is still empty."""
    machine = hardware(settings["device"], settings["threads"])
    head = origin(["python", "tools/benchmark_head.py", *flags], machine, installed_versions())
    return {**head, "settings": settings, "cases": []}


def case_record(case: Case, results: Sequence[Result], memory_method: str) -> dict[str, Any]:
    """One case for ``document["cases"]``: the results with medians and ratios; None: not measured."""
    return {**dataclasses.asdict(case), "memory_method": memory_method, "results": with_ratios(results)}


def with_ratios(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as records, with median and min of the seconds, and ratios within the mode: median time over that of
    ``materialised`` and of ``products``, peak over that of ``materialised``."""
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
    """The whole report: hardware and versions, one table a case and mode, and what the contestants are."""
    lines = ["# Output head: time, memory, error", "", *origin_lines(report), "", LEGEND, ""]
    for case in report["cases"]:
        lines += [case_tables(case), ""]
    return "\n".join(lines + ["## Contestants", "", *map(_description, CONTESTANTS.values()), ""])


def case_tables(case: dict[str, Any]) -> str:
    """The tables of one case, one a mode, with their headings."""
    sizes = f"N {case['tokens']:,}, H {case['hidden']:,}, V {case['vocab']:,}, {case['dtype']}"
    sizes += f", tp {case['tp']}" if case["tp"] > 1 else ""
    sizes += f", temperature {case['temperature']}" if case["temperature"] != 1.0 else ""
    parts = []
    for mode in dict.fromkeys(record["mode"] for record in case["results"]):
        rows = [_row(record) for record in case["results"] if record["mode"] == mode]
        parts += [f"## {mode}: {sizes}", "", table([COLUMNS, *rows]), ""]
    return "\n".join([*parts, f"Memory: {case['memory_method']}."])


def write(report: dict[str, Any], json_path: Path | None, markdown_path: Path | None) -> None:
    """Write what is asked for; a reader sees the old file or the new one, never half of one."""
    if json_path is not None:
        replace(json_path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if markdown_path is not None:
        replace(markdown_path, markdown(report))


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    kind = CONTESTANTS.get(record["contestant"], Contestant)
    remark = record["status"] if record["status"] != MEASURED else ""
    if not remark and record["mode"] == "training" and not kind.weighted:
        remark = "plain cross-entropy sum"
    forward = record["mode"] == "forward"
    shown = (
        ("logprob_error_max", "logprob_error_mean") if forward else ("hidden_gradient_error", "weight_gradient_error")
    )
    # The bare products allocate nothing and compute nothing that has a reference.
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
    package = f" ({contestant.distribution}, written for {contestant.version})" if contestant.distribution else ""
    return f"* {contestant.name}{package}: {contestant.note}"


def _ratio(record: dict[str, Any], rival: dict[str, Any], name: str) -> float | None:
    own, other = record[name], rival.get(name)
    return None if own is None or not other else own / other
