"""Measure speed and peak memory of the Nemotron sampler.

    python tools/benchmark_prompts.py [--rows 1000000] [--output docs/benchmarks/prompt_sampling.md]

Writes synthetic rows in the data set's layout as Parquet, several files per split, in the official proportions of the
splits. Then samples 10,000 prompts of them with ``tools/prepare_prompts.py nemotron`` in a process of its own, whose
peak memory is read from the kernel. The rows are removed afterwards.
"""

import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, without installing

FILES = 4  # of each split
_BATCH = 5000
_WORDS = [f"word{number}" for number in range(997)]


def rows(split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Make ``count`` rows with questions of about 120 and answers of about 800 characters; 1 in 50 has no question."""
    rng = random.Random(f"{split} {seed}")
    tools = json.dumps({"tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]})
    for number in range(count):
        question = "-" if number % 50 == 49 else f"{split} {seed} {number}: " + " ".join(rng.choices(_WORDS, k=15))
        messages = [
            {"role": "user", "content": question, "tool_calls": []},
            {"role": "assistant", "content": " ".join(rng.choices(_WORDS, k=110)), "tool_calls": []},
        ]
        yield {"uuid": f"{split}-{seed}-{number}", "category": split, "reasoning": "off", "messages": messages,
               "metadata": tools if split == "tool_calling" else "{}"}  # fmt: skip


def write_source(folder: Path, counts: dict[str, int]) -> int:
    """Write Parquet files with ``counts`` rows of each split below ``folder/data``; return their total bytes."""
    import itertools

    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    text = pa.string()
    message = pa.struct([("role", text), ("content", text), ("tool_calls", pa.list_(text))])
    names = ("uuid", "category", "reasoning", "metadata")
    schema = pa.schema([*((name, text) for name in names), ("messages", pa.list_(message))])
    for split, count in counts.items():
        for file in range(FILES):
            share = count // FILES + (file < count % FILES)
            path = folder / "data" / f"{split.removesuffix('_calling')}-{file:05}-of-{FILES:05}.parquet"
            with pq.ParquetWriter(path, schema) as writer:
                made = rows(split, share, file)
                while batch := list(itertools.islice(made, _BATCH)):
                    writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return sum(path.stat().st_size for path in (folder / "data").iterdir())


def measure(source: Path, output: Path, count: int) -> tuple[float, float]:
    """Run the command; return its seconds and peak memory (MB)."""
    command = [sys.executable, ROOT / "tools" / "prepare_prompts.py", "nemotron", "--source", source,
               "--output", output, "--count", str(count)]  # fmt: skip
    started = time.monotonic()
    subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6


def run(flags: Sequence[str]) -> None:
    """Parse ``flags``, measure, print and write the report.

    Raises:
        ConfigurationError: A flag is wrong.
    """
    from megatron_camopd.config.program import Parser, path_argument

    parser = Parser(description="Rate and memory of the Nemotron sampler.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--count", type=int, default=10_000, help="prompts to sample")
    parser.add_argument("--output", type=path_argument, help="Markdown file to write")
    arguments = parser.parse_args(flags)
    from tools.prompt_preparation.nemotron import quotas

    counts = quotas(arguments.rows)
    with tempfile.TemporaryDirectory() as name:
        size = write_source(Path(name) / "source", counts)
        seconds, megabytes = measure(Path(name) / "source", Path(name) / "out", arguments.count)
    text = (
        "# Sampling prompts of Nemotron-Post-Training-Dataset-v1\n\n"
        f"Made by `python tools/benchmark_prompts.py --rows {arguments.rows} --count {arguments.count}` on "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; one process, no GPU.\n\n"
        f"| synthetic rows | Parquet | sampled | time | rate | peak memory |\n|---|---|---|---|---|---|\n"
        f"| {arguments.rows:,} in {len(counts) * FILES} files | {size / 1e6:,.0f} MB | {arguments.count:,} | "
        f"{seconds:.0f} s | {arguments.rows / seconds:,.0f} rows/s, {size / 1e6 / seconds:.1f} MB/s | "
        f"{megabytes:.0f} MB |\n\n"
        "Time includes the SHA-256 of all files, for the manifest. The sampler keeps the sampled prompts alone.\n"
    )
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    print(text)


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("benchmark_prompts.py", lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
