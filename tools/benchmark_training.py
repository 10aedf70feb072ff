"""Measure training passes: by the share of samples trained, with diagnostics, and padded against packed.

    OMP_NUM_THREADS=1 python tools/benchmark_training.py [--preset tiny] [--json FILE] [--markdown FILE]

One process, random weights and random rollouts of the same length; the pass is the trainer's own ``update`` (forward,
backward, optimizer), called in turns with all, half, a quarter and a tenth of the samples. Gradient diagnostics
look at ``--diagnosed`` samples one at a time. Scoring and training of twice as many ragged rollouts are done padded, as
the trainer did before, and packed, with the same attention; a row of conversations with a mask and packed. Ratios
compare medians of the same run. Progress goes to stderr.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

SHARES = (1.0, 0.5, 0.25, 0.1)


def synthetic_batch(samples: int, prompt: int, response: int, vocabulary: int) -> Any:
    """Make a scored batch of random tokens.

    The gap is normally distributed; the rollout log-probabilities equal the student's.
    """
    import torch

    from megatron_camopd.batch import RolloutBatch, ScoredBatch

    generator = torch.Generator().manual_seed(0)
    student = -8 * torch.rand(samples, response, generator=generator)
    rollout = RolloutBatch(
        indices=torch.arange(samples),
        tokens=torch.randint(vocabulary, (samples, prompt + response), generator=generator),
        prompt_lengths=torch.full((samples,), prompt),
        response_lengths=torch.full((samples,), response),
        rollout_logprobs=student,
        truncated=torch.zeros(samples, dtype=torch.bool),
    )
    return ScoredBatch(
        rollout,
        torch.zeros(len(rollout), dtype=torch.int64),
        student + torch.randn(student.shape, generator=generator),
        student,
    )


def rounds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every call; the calls take turns, and the first round is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
        print(f"round {number} of {repeats}", file=sys.stderr, flush=True)
    return times


def measure(own: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build a trainer on a new checkpoint; return the seconds of each of its timed calls, and what packing measured."""
    import torch

    from megatron_camopd.diagnostics.gradients import DiagnosticsSettings, GradientDiagnostics
    from megatron_camopd.objective.method import TrainingWeights, broadcast_to_tokens
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner
    from tools.rollout_benchmark.model import PRESETS, checkpoint_of
    from tools.training_benchmark.packing import LONGEST, PackingBenchmark

    with checkpoint_of(PRESETS[own.preset], None) as (checkpoint, save):
        prompts = save.parent / "prompts.jsonl"
        prompts.write_text('{"prompt": "one"}\n')
        flags = {
            "load": checkpoint, "general-teacher-load": checkpoint, "save": save, "general-prompts": prompts,
            "preservation-steps": 0, "max-prompt-length": own.prompt_length, "max-response-length": own.response_length,
            "global-batch-size": own.samples, "micro-batch-size": own.micro_batch_size, "train-iters": 1000,
            "seq-length": max(LONGEST, own.prompt_length + own.response_length),
            "gradient-diagnostics-interval": 1, "gradient-diagnostics-samples": own.diagnosed,
        }  # fmt: skip
        args = parse_arguments([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        trainer = DistillRunner(args, plan_distillation(args))
        batch = synthetic_batch(own.samples, own.prompt_length, own.response_length, args.vocab_size)
        lengths = batch.rollout.response_lengths

        def weights(share: float) -> TrainingWeights:
            selected = torch.arange(own.samples) < max(1, round(share * own.samples))
            return TrainingWeights(
                broadcast_to_tokens(selected / (selected.sum() * lengths), batch.response_mask), selected
            )

        calls: dict[str, Callable[[], Any]] = {
            f"{share:.0%}": partial(trainer.update, batch, weights(share)) for share in SHARES
        }
        calls["diagnostics"] = lambda: trainer.diagnostics.measure(0, batch, weights(0.5))
        off = GradientDiagnostics(
            DiagnosticsSettings(gradient_diagnostics_interval=0, gradient_diagnostics_samples=1),
            trainer.passes, trainer.model, trainer.plan.table.branches, {}, trainer.collect,
            first_probe_index=args.global_batch_size,
        )  # fmt: skip
        calls["diagnostics off"] = lambda: off.measure(0, batch, weights(0.5))
        packing = PackingBenchmark(trainer, 2 * own.samples, 32 * own.samples)
        times = rounds(calls | packing.calls(), own.repeats)
        found = packing.report()
        torch.distributed.destroy_process_group()
    return times, found


def tables(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    from tools.benchmark_report import origin_lines, table

    work, times = document["workload"], document["seconds"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [["what", "median s", "fastest s", "of training all"]]
    for name, values in times.items():
        if ":" in name:
            continue
        label = f"training pass, {name} of the samples" if name.endswith("%") else name
        rows.append(
            [label, f"{medians[name]:.5f}", f"{min(values):.5f}", f"{100 * medians[name] / medians['100%']:.3f}%"]
        )
    lines = [
        "# Training pass by the share of samples trained", "", *origin_lines(document), "",
        f"{work['samples']} samples of {work['prompt_length']} + {work['response_length']} tokens, micro-batches of "
        f"{work['micro_batch_size']} x --seq-length tokens; the {work['preset']} preset of "
        f"`tools/rollout_benchmark/model.py`, random weights, fp32; "
        f"{len(times['100%'])} rounds. Diagnostics: gradients of {work['diagnosed']} single samples "
        "(one branch, no probe rollouts).", "", table(rows), "",
    ]  # fmt: skip
    return "\n".join([*lines, *packing_tables(document, medians)])


def packing_tables(document: dict[str, Any], medians: dict[str, float]) -> list[str]:
    """Return the lines about padded and packed micro-batches."""
    from tools.benchmark_report import number, table

    found, work = document.get("packing"), document["workload"]
    if found is None:
        return []
    rows = [["micro-batches", "padded / real tokens", "score s", "train s"]]
    names = [name.removeprefix("score: ") for name in medians if name.startswith("score: ")]
    for name in names:
        padding = found["padded_over_real"].get(name.removeprefix("padded, "))
        seconds = [f"{medians[f'{kind}: {name}']:.3f}" for kind in ("score", "train")]
        rows.append([name, "1.00" if padding is None else f"{padding:.2f}", *seconds])
    best = {kind: min(medians[f"{kind}: {name}"] for name in names if "packed" in name) for kind in ("score", "train")}
    ratios = [
        f"{name}: scoring {medians[f'score: {name}'] / best['score']:.2f} x, training "
        f"{medians[f'train: {name}'] / best['train']:.2f} x the time of the faster packing"
        for name in names
        if "padded" in name
    ]
    memory = found["fine_tune_peak_bytes"]
    times = {name: medians[f"fine-tune: {name}"] for name in memory}
    fine_tuning = [["row of fine-tuning", "forward + backward s", "peak extra memory MiB"]]
    fine_tuning += [[name, f"{times[name]:.3f}", number(memory[name], "{:.0f}", 2**-20)] for name in memory]
    balance = [["rows to 8 data-parallel ranks", "slowest rank / mean tokens"]]
    balance += [[name, f"{value:.3f}"] for name, value in found["balance"].items()]
    return [
        "# Padded and packed micro-batches", "",
        f"{2 * work['samples']} rollouts of 16 to 512 tokens (lognormal, median 90, sigma 0.9), together "
        f"{found['tokens']:,}; the same attention in all. Padded: a row each, sorted by length, as before.",
        "",
        table(rows), "", *(f"* {line}" for line in ratios), "",
        f"A row of {32 * work['samples']:,} tokens, conversations of 64: kept apart by a mask in Megatron's local "
        "attention, as before, or packed.", "",
        table(fine_tuning), "", table(balance), "",
    ]  # fmt: skip


def _document(flags: Sequence[str], own: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the JSON document."""
    from tools.benchmark_report import training_document

    workload = {name: value for name, value in vars(own).items() if name not in ("json", "markdown")}
    times, packing = measure(own)
    document = training_document(["tools/benchmark_training.py", *flags], workload, times)
    return document | {"packing": packing}


def run(flags: Sequence[str]) -> None:
    """Parse ``flags``, measure, print and write the report.

    Raises:
        ConfigurationError: A flag is wrong.
    """
    from megatron_camopd.config.program import Parser, path_argument

    parser = Parser(description="Time the training pass and the gradient diagnostics.")
    parser.add_argument("--preset", choices=("tiny",), default="tiny", help="shape of the model")
    parser.add_argument("--samples", type=int, default=64, help="global batch")
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--response-length", type=int, default=112)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--diagnosed", type=int, default=16, help="samples of the gradient diagnostics")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--json", type=path_argument, metavar="FILE")
    parser.add_argument("--markdown", type=path_argument, metavar="FILE")
    own = parser.parse_args(flags)
    from megatron_camopd.runtime import accelerator

    accelerator.activate()  # before Megatron is imported
    from megatron_camopd.runtime.startup import single_process_environment
    from tools.benchmark_report import write_document

    os.environ.update(single_process_environment())
    document = _document(flags, own)
    write_document(document, tables(document), own.json, own.markdown)


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("benchmark_training.py", lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
