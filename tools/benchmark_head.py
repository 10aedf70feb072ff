"""Measure time, peak extra memory and error of the output head, ours and others'.

The others are a materialised head in plain torch, other packages, and the matrix products alone.

    python tools/benchmark_head.py                       # CPU: N 1024, H 1024, V 151,936, fp32, 2 threads; 5 minutes
    python tools/benchmark_head.py --preset gpu          # N 8192, 32768; H 2560, 4096, 5120; V 151,936; bf16
    python tools/benchmark_head.py --tokens 512 2048 --hidden 2048 --dtype bfloat16 --tp 2 --mode training

Several values of --tokens and --hidden make a grid. A contestant whose package is missing is listed as such; nothing is
installed. Progress goes to stderr, the tables to stdout; --json and --markdown write them, with every single time,
hardware and versions, after each point of the grid. ``tools/head_benchmark/`` documents what is measured and how.
Exit status: 0, or 2 after one line on stderr that says what is wrong with the flags.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", "tokens": [1024], "hidden": [1024], "dtype": "float32", "repeats": 5},
    "gpu": {
        "device": "cuda",
        "tokens": [8192, 32768],
        "hidden": [2560, 4096, 5120],
        "dtype": "bfloat16",
        "repeats": 20,
    },
}


def parse_arguments(flags: Sequence[str]) -> argparse.Namespace:
    """Parse the flags, fill in the preset's values and check them.

    Raises:
        ConfigurationError: A value cannot work, in one line.
    """
    from megatron_camopd.config.program import Parser, path_argument

    parser = Parser(description="Measure the output head: time, peak extra memory, error.")
    parser.add_argument("--preset", choices=PRESETS, help="values of flags not given (default: that of the device)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="tokens of one call")
    parser.add_argument("--hidden", type=int, nargs="+", metavar="H", help="hidden sizes")
    parser.add_argument("--vocab", type=int, default=151936, help="vocabulary size over all ranks (default: 151936)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of hidden states and weight")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    parser.add_argument("--mode", choices=("forward", "training", "both"), default="both")
    parser.add_argument("--tp", type=int, default=1, help="processes that share the vocabulary (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's, else CUDA where there is any")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads a process (default: 2)")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: 5 on CPU, 20 on CUDA)")
    parser.add_argument("--warmup", type=int, default=1, help="calls before the timed ones (default: 1)")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out (on CPU: fewer processes)")
    parser.add_argument("--json", type=path_argument, metavar="FILE",
                        help="write the report, every single time included")  # fmt: skip
    parser.add_argument("--markdown", type=path_argument, metavar="FILE", help="write the tables")
    args = parser.parse_args(flags)
    fill_from_preset(args)
    check_arguments(args)
    return args


def fill_from_preset(args: argparse.Namespace) -> None:
    """Set the flags that were not given to the values of ``--preset``, or of the device's preset."""
    import torch

    if args.preset is None:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        args.preset = "gpu" if device == "cuda" else "cpu"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_arguments(args: argparse.Namespace) -> None:
    """Check the values.

    Raises:
        ConfigurationError: A value cannot work.
    """
    import torch

    from megatron_camopd.errors import ConfigurationError
    from tools.head_benchmark.contestants import CONTESTANTS

    args.contestants = args.contestants or list(CONTESTANTS)
    if unknown := [name for name in args.contestants if name not in CONTESTANTS]:
        raise ConfigurationError(
            f"--contestants: no contestant is called {unknown[0]!r}; there are: {' '.join(CONTESTANTS)}"
        )
    for name in ("tokens", "hidden", "vocab", "tp", "threads", "repeats", "warmup"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ConfigurationError(f"--{name} is {value}; it must be at least 1")
    if not 0.0 < args.temperature < float("inf"):
        raise ConfigurationError(f"--temperature is {args.temperature}; it must be positive and finite")
    if args.vocab % args.tp:
        raise ConfigurationError(f"--tp is {args.tp}; it must divide --vocab, {args.vocab}")
    if args.device == "cuda" and torch.cuda.device_count() < args.tp:
        raise ConfigurationError(
            f"--device cuda with --tp {args.tp}: {torch.cuda.device_count()} CUDA devices are there"
        )
    for flag in ("json", "markdown"):
        path = getattr(args, flag)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigurationError(f"--{flag} is {path}; the folder {path.parent} does not exist")


def run(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Measure the grid; print and write each case when it is done. The report shows the command line ``flags``."""
    import torch

    from tools.head_benchmark import memory, report
    from tools.head_benchmark.contestants import CONTESTANTS
    from tools.head_benchmark.measure import MODES, Settings, measure_case
    from tools.head_benchmark.problem import Case

    settings = Settings(args.repeats, args.threads, args.device, args.warmup, not args.no_memory)
    contestants = [CONTESTANTS[name] for name in args.contestants]
    modes = MODES if args.mode == "both" else (args.mode,)
    method = memory.method(torch.device(args.device)) if settings.memory else report.NOT_MEASURED
    kept = {name: value for name, value in vars(args).items() if name not in ("json", "markdown")}
    whole = report.document(flags, kept)
    grid = list(itertools.product(args.hidden, args.tokens))
    for place, (hidden, tokens) in enumerate(grid, start=1):
        case = Case(tokens, hidden, args.vocab, args.dtype, args.temperature, args.tp)
        print(f"case {place}/{len(grid)}: {case}", file=sys.stderr, flush=True)
        record = report.case_record(case, measure_case(case, contestants, modes, settings), method)
        whole["cases"].append(record)
        print(report.case_tables(record), flush=True)
        report.write(whole, args.json, args.markdown)


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("benchmark_head.py", lambda: run(parse_arguments(flags), flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
