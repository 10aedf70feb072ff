"""Measure what checksums cost: seconds of a save with and without them, and of verifying a checkpoint.

    OMP_NUM_THREADS=1 python tools/benchmark_checkpoint.py [--preset small] [--json FILE] [--markdown FILE]

One process saves the state of a training run, model and Adam's moments, in turns with and without SHA-256, each time in
a new folder; then it hashes the checkpoint as the start of a run does. Ratios compare medians of the same run.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

WITH, WITHOUT, VERIFY = "save with checksums", "save without", "verification"


@contextlib.contextmanager
def _no_checksums() -> Iterator[list[float]]:
    yield []


def measure(own: argparse.Namespace) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of every timed call, and the size of a checkpoint in bytes."""
    import torch

    from megatron_camopd.checkpoint import training_state
    from megatron_camopd.checkpoint.checksums import damaged_files
    from megatron_camopd.checkpoint.directory import CheckpointLocation
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner
    from tools.rollout_benchmark.model import PRESETS, checkpoint_of

    module: Any = training_state
    checksums, size = module._checksums_before_tracker, 0
    times: dict[str, list[float]] = {WITH: [], WITHOUT: [], VERIFY: []}
    with checkpoint_of(PRESETS[own.preset], None) as (checkpoint, save):
        prompts = save.parent / "prompts.jsonl"
        prompts.write_text('{"prompt": "one"}\n')
        flags = {
            "load": checkpoint, "general-teacher-load": checkpoint, "save": save, "general-prompts": prompts,
            "preservation-steps": 0, "max-prompt-length": 8, "max-response-length": 8, "global-batch-size": 2,
            "train-iters": 1000,
        }  # fmt: skip
        args = parse_arguments([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        trainer = DistillRunner(args, plan_distillation(args))
        trainer.train_step()  # Adam has moments from its first step on
        for number in range(own.repeats + 1):
            for name in (WITH, WITHOUT):
                trainer.step += 1
                module._checksums_before_tracker = checksums if name == WITH else _no_checksums
                os.sync()  # what the save before left to the disk is not this one's
                start = time.perf_counter()
                module.save_training(
                    args, trainer.step, trainer.model, trainer.optimizer, trainer.scheduler, trainer.state_dict()
                )
                seconds = {name: time.perf_counter() - start}
                folder = CheckpointLocation(Path(args.save), trainer.step).folder
                if name == WITH:
                    start = time.perf_counter()
                    assert damaged_files([folder]) == {}
                    seconds[VERIFY] = time.perf_counter() - start
                    size = sum(path.stat().st_size for path in folder.iterdir())
                shutil.rmtree(folder)
                for each, value in seconds.items() if number else ():  # the first round is not timed
                    times[each].append(value)
            print(f"round {number} of {own.repeats}", file=sys.stderr, flush=True)
        torch.distributed.destroy_process_group()
    return times, size


def tables(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    from tools.benchmark_report import origin_lines, table

    times, size = document["seconds"], document["workload"]["bytes"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [["what", "median s", "fastest s", "of a save without", "GB/s"]]
    for name, values in times.items():
        ratio = f"{100 * medians[name] / medians[WITHOUT]:.1f}%"
        rows.append([name, f"{medians[name]:.3f}", f"{min(values):.3f}", ratio, f"{size / medians[name] / 1e9:.2f}"])
    lines = [
        "# Checksums of checkpoints", "", *origin_lines(document), "",
        f"A checkpoint of {size / 1e9:.2f} GB (the {document['workload']['preset']} preset of "
        "`tools/rollout_benchmark/model.py`, fp32, with Adam's moments); one process; "
        f"{len(times[WITH])} rounds.", "", table(rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def run(flags: Sequence[str]) -> None:
    """Parse ``flags``, measure, print and write the report.

    Raises:
        ConfigurationError: A flag is wrong.
    """
    from megatron_camopd.config.program import Parser, path_argument

    parser = Parser(description="Time saves with and without checksums.")
    parser.add_argument("--preset", choices=("tiny", "small"), default="small", help="shape of the model")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--json", type=path_argument, metavar="FILE")
    parser.add_argument("--markdown", type=path_argument, metavar="FILE")
    own = parser.parse_args(flags)
    from megatron_camopd.runtime import accelerator

    accelerator.activate()  # before Megatron is imported
    from megatron_camopd.runtime.startup import single_process_environment
    from tools.benchmark_report import training_document, write_document

    os.environ.update(single_process_environment())
    seconds, size = measure(own)
    workload = {"preset": own.preset, "repeats": own.repeats, "bytes": size}
    document = training_document(["tools/benchmark_checkpoint.py", *flags], workload, seconds)
    write_document(document, tables(document), own.json, own.markdown)


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("benchmark_checkpoint.py", lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
