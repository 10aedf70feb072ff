"""Make the prompt files of a CaMOPD run from public data sets; each source has its own sub-command.

    python tools/prepare_prompts.py nemotron --output data/general --code-questions taco=TACO ...  # 10,000 prompts
    python tools/prepare_prompts.py coser --output data/coser                            # role-play prompts and SFT set
    python tools/prepare_prompts.py medical --output data/medical                        # 4K + 3K + 2K + 1K questions
    python tools/prepare_prompts.py jsonl --source my.jsonl --prompt question --output data/mine

Sources are local files in the layout that the source publishes, or its name on the Hugging Face hub, which is streamed.
The output is JSONL files and manifest.json: source, revision, row ids, counts, filters, seed, SHA-256. The same sources
and flags give the same bytes; an output that is there already is left alone. ``tools/prompt_preparation/`` has a module
for each sub-command, which documents its rules. Progress goes to stderr, a table of rows kept and skipped to stdout.

Exit status: 0; 2 after one line on stderr that says what is wrong with the flags or files; 128 + the number of the
signal that ended it, as in 130 after Ctrl-C: nothing is then left but what a sub-command keeps to go on from.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

# Sub-command: (module with add_flags(parser) and prepare(args), one line for --help).
COMMANDS = {
    "nemotron": ("nemotron", "general prompts: a sample of Nemotron-Post-Training-Dataset-v1 in its proportions"),
    "coser": ("coser", "role-play prompts: the longest conversations of CoSER; the others as an SFT set"),
    "medical": ("medical", "medical questions: MedMCQA, MedReason, Medical-R1-Distill and m23k"),
    "jsonl": ("plain", "prompts of any file, with the names of its fields"),
}


def parse_arguments(flags: Sequence[str]) -> argparse.Namespace:
    """Parse the sub-command and its flags.

    Raises:
        ConfigurationError: A flag is wrong, in one line.
    """
    from megatron_camopd.config.program import Parser
    from megatron_camopd.errors import ConfigurationError

    parser = Parser(prog="prepare_prompts.py", description="Make prompt files of public data sets.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SOURCE")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False,
            multiline=["system"], unlimited=["category_value"],
        )  # fmt: skip
        add_common_flags(command)
        if name in flags[:1]:  # so that only the module in use is imported
            importlib.import_module(f"tools.prompt_preparation.{module}").add_flags(command)
    args = parser.parse_args(flags)
    if args.max_characters is not None and args.max_characters < 1:
        raise ConfigurationError(f"--max-characters {args.max_characters}: must be at least 1")
    return args


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every sub-command has."""
    from megatron_camopd.config.program import path_argument

    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made with other settings")
    parser.add_argument("--seed", type=int, default=1234, help="of every choice by chance (default: 1234)")
    parser.add_argument("--max-characters", type=int, metavar="N",
                        help="skip and count rows whose prompt has more characters (default: no limit)")  # fmt: skip
    parser.add_argument("--revision", help="commit, branch or tag of the hub data set (default: the newest)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; return the counts to show.

    Raises:
        ConfigurationError: A source, a flag or the output is wrong.
    """
    module, _ = COMMANDS[args.command]
    return importlib.import_module(f"tools.prompt_preparation.{module}").prepare(args)


def table(counts: dict[str, Any]) -> str:
    """Return the counts as aligned lines; a nested count is titled "outer, inner"."""
    rows: list[tuple[str, str]] = []

    def add(values: dict[str, Any], before: str) -> None:
        for name, value in values.items():
            title = f"{before}, {name}" if before else str(name)
            if isinstance(value, dict):
                add(value, title)
            else:
                rows.append((title, f"{value:,}" if isinstance(value, int) else str(value)))

    add(counts, "")
    names, figures = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {figure:>{figures}}" for name, figure in rows)


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("prepare_prompts.py", lambda: print(table(run(parse_arguments(flags))), flush=True))


if __name__ == "__main__":
    from megatron_camopd.config.program import stop_on_signals

    stop_on_signals("prepare_prompts.py")
    sys.exit(main(sys.argv[1:]))
