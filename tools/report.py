"""Write a page about training runs that anyone can read: figures, tables and captions in one HTML file, and PNG files.

    python tools/report.py RUN                                   # writes RUN/report/index.html and RUN/report/*.png
    python tools/report.py CaMOPD=runs/a Vanilla=runs/b --output comparison --title "CaMOPD and Vanilla MOPD"
    python tools/report.py RUN --scores scores.json

RUN is the folder that a run's --save named, with metrics.jsonl; a run may still be going on. Several runs are overlaid
and compared in a table, each under its folder's name or LABEL. Scores are those of examples/tiny_cpu/evaluate.py: from
RUN/scores.json, or scores.json in the folder above where it can only belong to RUN, or --scores. The page loads nothing
from the network, and is readable on light and dark screens, wide and narrow. Where a run logged samples to
RUN/samples.jsonl (--log-samples-interval), the page shows them and marks the tokens of the largest gaps.
``tools/run_report/`` documents what is shown.

Exit status: 0; 2 after one line on stderr that says what is wrong with the flags or files; 128 + the number of the
signal that ended it, as in 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing


def parse_arguments(flags: Sequence[str]) -> argparse.Namespace:
    """Parse the flags.

    Raises:
        ConfigurationError: There are several runs, but no --output.
    """
    from megatron_camopd.config.program import Parser, path_argument
    from megatron_camopd.errors import ConfigurationError

    parser = Parser(description="Write an HTML page and PNG figures about training runs.", unlimited=["title"])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with metrics.jsonl, or LABEL=FOLDER")
    parser.add_argument("--output", type=path_argument, metavar="DIR",
                        help="folder to write (default, one run: RUN/report)")  # fmt: skip
    parser.add_argument("--title", help="of the page (default: made of the labels)")
    parser.add_argument("--scores", action="append", default=[], metavar="[LABEL=]FILE",
                        help="scores of a run's evaluation; may be given once for each run")  # fmt: skip
    args = parser.parse_args(flags)
    if args.output is None and len(args.runs) > 1:
        raise ConfigurationError("--output is not given; with several runs it must name the folder to write")
    return args


def run(args: argparse.Namespace) -> Path:
    """Read the runs, draw, and write the page; return its path.

    Raises:
        ConfigurationError: A run or scores cannot be read, or the output cannot be written.
    """
    from megatron_camopd.errors import ConfigurationError
    from tools.run_report.reading import read_runs

    runs = read_runs(args.runs, args.scores)
    from tools.run_report.content import render  # late: the import takes a second, and wrong input is reported first
    from tools.run_report.page import write

    output: Path = args.output or runs[0].folder / "report"
    rendered = render(runs, args.title)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, image in rendered.images.items():
            write(output / name, image)
        write(output / "index.html", rendered.page)
    except OSError as error:
        raise ConfigurationError(f"--output: {output} cannot be written ({error.strerror})") from error
    return output / "index.html"


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("report.py", lambda: print(run(parse_arguments(flags)), flush=True))


if __name__ == "__main__":
    from megatron_camopd.config.program import stop_on_signals

    stop_on_signals("report.py")
    sys.exit(main(sys.argv[1:]))
