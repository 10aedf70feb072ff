"""Check on this machine what docs/reliability.md promises: runs survive being killed, and bad inputs are refused.

    python tools/reliability.py kills --count 100 --layout dp2 --layout tp2 --layout pp2
    python tools/reliability.py kills --count 20 --layout tp8 -- <flags of pretrain_camopd.py without --save>
    python tools/reliability.py inputs

Without flags behind ``--``, the job is the demo's, whose inputs are made first. Exit status: 0 if all is as promised, 1
if not, 2 after one line about the command line.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, without installing

_SIZES = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "dp": None,
}


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    outcome = [0]

    def work() -> None:
        args = _parse(words)
        with tempfile.TemporaryDirectory() as folder:
            run = {"kills": _kills, "inputs": _inputs}[args.command]
            outcome[0] = run(args, Path(args.work or folder).resolve())

    return run_program("reliability.py", work) or outcome[0]


def _parse(words: Sequence[str]) -> Namespace:
    from megatron_camopd.config.program import Parser
    from megatron_camopd.errors import ConfigurationError
    from tools.reliability_checks.kills import MOMENTS

    parser = Parser("reliability.py", description="Check that runs survive being killed and bad inputs are refused.")
    commands = parser.add_subparsers(dest="command", required=True)
    kills = commands.add_parser("kills", help="end runs at many moments, resume them, compare with a run left alone")
    kills.add_argument("--count", type=int, default=20, help="number of ends, spread over the layouts (default 20)")
    kills.add_argument("--layout", action="append", help="parallel sizes such as tp2, pp2, dp2 or tp2pp2 (default dp2)")
    kills.add_argument("--moment", action="append", choices=MOMENTS, help="when a run is ended (default: all of them)")
    kills.add_argument("flags", nargs="*", help="after --: flags of pretrain_camopd.py without --save")
    inputs = commands.add_parser("inputs", help="try malformed inputs, all of which must be refused or passed over")
    inputs.add_argument("--count", type=int, default=210, help="number of inputs, of all kinds in turn (default 210)")
    for command in (kills, inputs):
        command.add_argument("--seed", type=int, default=0, help="seed of what is chosen at random")
        command.add_argument("--work", help="new folder for the runs (default: a temporary one, removed at the end)")
    args = parser.parse_args(words)
    if args.count < 1:
        raise ConfigurationError(f"--count {args.count}: must be at least 1")
    if args.work and Path(args.work).exists():
        raise ConfigurationError(f"--work {args.work}: is there already; name a new folder")
    return args


def _kills(args: Namespace, work: Path) -> int:
    from tools.reliability_checks.kills import MOMENTS, Job, run_kills, table

    layouts = args.layout or ["dp2"]
    sizes = [_sizes(layout) for layout in layouts]
    flags = args.flags or _demo_flags(work)
    results, began = [], time.monotonic()
    with tqdm(total=args.count, unit=" ends") as bar:
        for number, (layout, (processes, parallel)) in enumerate(zip(layouts, sizes, strict=True)):
            count = args.count * (number + 1) // len(layouts) - args.count * number // len(layouts)
            job = Job(layout, processes, (*flags, *parallel))
            folder = work / layout
            folder.mkdir(parents=True)
            results.append(
                (job, run_kills(job, count, folder, seed=args.seed, moments=args.moment or MOMENTS, bar=bar))
            )
    print("\n".join(table(results)))
    found = [problem for _, result in results for problem in result.differences]
    print(f"{args.count} ends in {(time.monotonic() - began) / 60:.0f} minutes; {len(found)} differences", flush=True)
    for problem in found:
        print(problem)
    return 1 if found else 0


def _inputs(args: Namespace, work: Path) -> int:
    from tools.reliability_checks.inputs import Material, run_inputs
    from tools.reliability_checks.kills import Job

    os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that are forked
    words = _demo_flags(work)
    flags = dict(zip(words[::2], words[1::2], strict=True))
    run = work / "run"
    subprocess.run(Job("one process", 1, tuple(words)).command(run), check=True, stdout=subprocess.DEVNULL)
    made = work / "inputs"
    material = Material(
        made / "specialist", made / "megatron/specialist", run, made / "prompts/general_prompts.jsonl", flags
    )
    report = run_inputs(material, args.count, work / "cases", seed=args.seed)
    print("\n".join(["| kind | inputs |", "|---|---|", *(f"| {name} | {n} |" for name, n in report.counts.items())]))
    print(f"{report.counts.total()} inputs; {len(report.problems)} not as promised", flush=True)
    for problem in report.problems:
        print(problem)
    return 1 if report.problems else 0


def _sizes(layout: str) -> tuple[int, list[str]]:
    """Return the number of processes of a layout such as tp2pp2, and the flags for it."""
    from megatron_camopd.errors import ConfigurationError

    parts = re.findall(r"(tp|pp|cp|dp)([1-9][0-9]*)", layout)
    if "".join(map("".join, parts)) != layout or not parts or len({name for name, _ in parts}) < len(parts):
        raise ConfigurationError(f"--layout {layout!r}: expected sizes such as tp2, pp2, dp2 or tp2pp2")
    processes, flags = 1, []
    for name, size in parts:
        processes *= int(size)
        flag = _SIZES[name]
        flags += [] if flag is None else [flag, size]
    return processes, flags


def _demo_flags(work: Path) -> list[str]:
    """Make the demo's inputs in ``work`` and return flags that train on them for twelve short steps."""
    output = work / "inputs"
    output.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["bash", str(ROOT / "examples/tiny_cpu/prepare.sh")], check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"OUTPUT": str(output)},
    )  # fmt: skip
    return [
        "--load", str(output / "megatron/specialist"), "--general-teacher-load", str(output / "megatron/general"),
        "--general-prompts", str(output / "prompts/general_prompts.jsonl"),
        "--domain-prompts", str(output / "prompts/domain_prompts.jsonl"),
        "--max-prompt-length", "32", "--max-response-length", "16", "--global-batch-size", "32",
        "--max-tokens-per-microbatch", "384", "--train-iters", "12", "--save-interval", "3", "--lr", "3e-4",
        "--clip-grad", "1.0", "--recovery-steps", "1", "--log-samples", "2",
    ]  # fmt: skip


if __name__ == "__main__":
    from megatron_camopd.config.program import stop_on_signals

    stop_on_signals("reliability.py")
    sys.exit(main(sys.argv[1:]))
