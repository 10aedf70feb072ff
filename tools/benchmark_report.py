"""Parts that the reports of all benchmarks share: the origin of a run (command, date, versions), tables, files."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

NOT_MEASURED = "not measured"


def origin(command: Sequence[str], hardware_name: str, versions: dict[str, str | None]) -> dict[str, Any]:
    """Return the head of a JSON document: command, time, commit, hardware and versions (None: not installed)."""
    return {
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": hardware_name,
        "versions": {"python": platform.python_version(), **versions},
    }


def origin_lines(report: dict[str, Any]) -> list[str]:
    """Return the result of :func:`origin` as a Markdown list, without packages that are not installed."""
    installed = [f"{name} {version}" for name, version in report["versions"].items() if version]
    lines = [report["hardware"], ", ".join(installed), f"{report['date']}, commit {report['commit']}"]
    return [f"* {line}" for line in [*lines, f"`{report['command']}`"]]


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each distribution, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def hardware(device: str, threads: int) -> str:
    """Return the device's name and count; for a CPU its name, cores and threads per process."""
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{_cpu_model()}, {os.cpu_count()} cores, {threads} threads a process"


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """Format ``value`` times ``scale`` by ``form``; None is shown as not measured."""
    return NOT_MEASURED if value is None else form.format(value * scale)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded to be readable as plain text; columns without any entry are left out."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in zip(*kept, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def training_document(
    words: Sequence[str], workload: dict[str, Any], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Return the JSON document of a benchmark of the trainer, which has run in this process.

    Args:
        words: Script and flags.
        workload: What was measured, as JSON values.
        seconds: The seconds of every timed call, by what was called.
    """
    from megatron_camopd.runtime import accelerator

    versions = {"torch": torch.__version__, **package_versions(("megatron-core",))}
    machine = hardware(accelerator.current().kind, torch.get_num_threads())
    return {
        **origin(["python", *words], machine, versions),
        "load_average": round(os.getloadavg()[0], 1),
        "workload": workload,
        "seconds": seconds,
    }


def write_document(document: dict[str, Any], markdown: str, json_path: Path | None, markdown_path: Path | None) -> None:
    """Print a report, and write its JSON and its Markdown to the files that are given."""
    print(markdown)
    for path, text in ((json_path, json.dumps(document, indent=1) + "\n"), (markdown_path, markdown)):
        if path is not None:
            replace(path, text)


def replace(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never a part of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _commit() -> str:
    """Return the checkout's commit, with a mark where files differ from it."""
    root = Path(__file__).resolve().parents[1]
    try:
        run = [["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
        commit, changes = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in run
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with changes" if changes else "")


def _cpu_model() -> str:
    """Return the CPU's model name, or its architecture where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
