"""The report of a run: a JSON document with every single time, and the same figures as Markdown tables."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from tools.benchmark_report import number, origin_lines, replace, table
from tools.rollout_benchmark.measure import MEASURED, Measurement, Result

ENGINE_COLUMNS = ("engine", "tokens/s", "median s", "min s", "x native", "remark")
SYNC_COLUMNS = ("weights", "median s", "min s", "GB/s", "peak extra MiB", "% of model", "remark")
LEGEND = """\
Both engines sampled the same prompts in turns; no token ends a response. tokens/s: response tokens of all processes in
the median time of a rollout. x native: tokens/s over those of the megatron engine in this run. Times are of the
slowest process. The megatron engine runs on the trained weights: nothing is passed on to it.

weights alone: one pass of all tensors, checksums included, and nobody to keep them. sync: vLLM takes them over, what
can be read of it is compared by checksum (not the matrices that it packs on a CPU), its prefix cache is emptied. sync
and probe: and a probe is sampled twice and scored by the trainer. GB/s: the model's bytes (1e9) in the median time.
Peak extra: memory of one process beyond what existed before, the largest of all processes; some 50 MiB of it are for
blocks of the checksums, however large the model is. Measured by"""
METHODS = {
    "cuda": "torch's allocator (torch.cuda.max_memory_allocated).",
    "cpu": "the resident set (VmHWM where Linux resets it), in calls that were not timed.",
}


def record(found: Measurement) -> dict[str, Any]:
    """Return the measurement as a record with medians, rates and ratios (None: not measured)."""
    engines = [_with_times(result) for result in found.engines]
    for entry in engines:
        median = entry["median_seconds"]
        entry["tokens_per_second"] = None if median is None else found.response_tokens / median
    for entry in engines:
        own, native = entry["tokens_per_second"], engines[0]["tokens_per_second"]
        entry["over_native"] = None if own is None or native is None else own / native
    syncs = [_with_times(result) for result in found.syncs]
    for entry in syncs:
        median, peak = entry["median_seconds"], entry["peak_extra_bytes"]
        entry["bytes_per_second"] = None if median is None else found.model_bytes / median
        entry["peak_over_model"] = None if peak is None else peak / found.model_bytes
    return dataclasses.asdict(found) | {"engines": engines, "syncs": syncs}


def markdown(report: dict[str, Any]) -> str:
    """Return the whole report: origin, then the tables."""
    lines = ["# Rollout: engines and weight sync", "", *origin_lines(report)]
    before, after = report["load_averages"]
    lines += [f"* load average before and after: {before}, {after} (what else runs here makes times longer)", ""]
    return "\n".join([*lines, LEGEND + " " + METHODS[report["device"]], "", tables(report), ""])


def tables(report: dict[str, Any]) -> str:
    """Return the tables, with sizes of model and workload."""
    found, shape, work = report["measurement"], report["layout"], report["workload"]
    model = f"{report['model']}, {report['dtype']}, {found['model_bytes'] / 2**20:,.1f} MiB"
    training = f"TP {shape['tensor_parallel']}, PP {shape['pipeline_parallel']}, DP {shape['data_parallel']}"
    engines = f"{shape['vllm_engines']} vLLM engine(s) of TP {shape['rollout_tensor_parallel']}"
    prompts = f"{work['shortest_prompt']} to {work['longest_prompt']} tokens ({found['prompt_tokens']:,} in all)"
    lines = [
        f"## {model}: {shape['processes']} process(es), {training}; {engines}",
        "",
        f"{work['prompts']} prompts of {prompts}, responses of {work['response_length']} tokens.",
        "",
        table([ENGINE_COLUMNS, *map(_engine_row, found["engines"])]),
        "",
        table([SYNC_COLUMNS, *map(_sync_row, found["syncs"])]),
    ]
    if found["vllm_start_seconds"] is not None:
        lines += [
            "",
            f"Start of vLLM: {found['vllm_start_seconds']:.1f} s, import included; the first sync, with its probe: "
            f"{found['first_sync_seconds']:.1f} s.",
        ]
    return "\n".join(lines)


def write(report: dict[str, Any], json_path: Path | None, markdown_path: Path | None) -> None:
    """Write the files whose paths are given; a reader never sees a partly written file."""
    if json_path is not None:
        replace(json_path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if markdown_path is not None:
        replace(markdown_path, markdown(report))


def _with_times(result: Result) -> dict[str, Any]:
    """Return the result as a record with median and minimum of the seconds."""
    median = statistics.median(result.seconds) if result.seconds else None
    return dataclasses.asdict(result) | {
        "median_seconds": median,
        "min_seconds": min(result.seconds, default=None),
    }


def _engine_row(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the table row of an engine."""
    return (
        entry["name"],
        number(entry["tokens_per_second"], "{:,.0f}"),
        number(entry["median_seconds"], "{:.3f}"),
        number(entry["min_seconds"], "{:.3f}"),
        number(entry["over_native"], "{:.2f}"),
        _remark(entry),
    )


def _sync_row(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the table row of a kind of weight sync."""
    return (
        entry["name"],
        number(entry["median_seconds"], "{:.4f}"),
        number(entry["min_seconds"], "{:.4f}"),
        number(entry["bytes_per_second"], "{:.3f}", 1e-9),
        number(entry["peak_extra_bytes"], "{:,.1f}", 2.0**-20),
        number(entry["peak_over_model"], "{:.1f}", 100.0),
        _remark(entry),
    )


def _remark(entry: dict[str, Any]) -> str:
    """Return why an entry was not measured, or an empty text."""
    return entry["status"] if entry["status"] != MEASURED else ""
