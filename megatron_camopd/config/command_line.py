"""Parsing of the command line by Megatron's parser, with the flags of our settings and other defaults.

Megatron's flags keep their names and meaning. Some of Megatron's defaults do not suit distillation (dropout, fatal NaN
checks, optimizer checkpoints that cannot be resharded) or a machine without CUDA. Other defaults for them are set on
the parser, so an explicit flag still takes precedence.
"""

import contextlib
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron_camopd.config.megatron_numbers import check_environment
from megatron_camopd.config.settings import Settings, add_settings, flag_of
from megatron_camopd.config.words import check_file, check_value, names_path, one_line
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator

# Our defaults of Megatron's flags, and the reasons for them.
_DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,  # gaps compare exact log-probabilities
    "hidden_dropout": 0.0,
    "check_for_nan_in_loss_and_grad": False,  # a bad step is skipped and counted instead of ending the job
    "rerun_mode": "disabled",
    "use_checkpoint_args": True,
    "dist_ckpt_optim_fully_reshardable": True,  # resume at another TP/PP/DP
    "eval_iters": 0,
    "eval_interval": 100,
    "log_interval": 1,
    "enable_one_logger": False,
    # A resumed run may have more steps; config/resume.py compares its other settings with those of the checkpoint.
    "override_opt_param_scheduler": True,
    "save_interval": 20,  # a failure costs at most these steps; the last step is always saved
    "micro_batch_size": 1,
    # The paper's training settings (appendix A).
    "global_batch_size": 512,
    "train_iters": 120,
    "lr": 2e-6,
    "lr_decay_style": "constant",
}
# Arguments that are lists of files with rows, which are read to their end.
_ROW_FILES = ("general_prompts", "domain_prompts", "prompts", "conversations", "validation_conversations")


def parse_command_line(
    argv: Sequence[str] | None, groups: Sequence[type[Settings]], choices: Mapping[str, Sequence[str]]
) -> tuple[Namespace, dict[str, str]]:
    """Parse ``argv`` (default: the command line) with Megatron's parser and the flags of ``groups``.

    Args:
        argv: The words of the command line, without the program's name.
        groups: The settings whose flags are added.
        choices: The allowed values of arguments that a registry defines, by argument name.

    Returns:
        Megatron's namespace, not validated yet, and the given flags as written, by argument name.

    Raises:
        ConfigurationError: A flag is unknown, its value cannot be parsed, or it is a text or path that cannot work.
    """
    accelerator.activate()
    from megatron.training.arguments import parse_args  # imported here: accelerator.activate() comes first

    check_environment()
    parsers: list[ArgumentParser] = []

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        return add_camopd_arguments(parser, groups, choices)

    with _words(argv):
        if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv):  # Megatron would drop all flags for it
            raise ConfigurationError("--yaml-cfg: not supported by CaMOPD training; give the settings as flags")
        dashes = next((word for word in sys.argv if word.startswith("--") and word.endswith("=--")), None)
        if dashes is not None:  # argparse would give the flag an empty list
            raise ConfigurationError(f"{dashes.removesuffix('=--')}: has the value '--'; give one of its own")
        args = parse_args(add_arguments)
        given = _given_flags(parsers[0], sys.argv[1:])
    for name, flag in given.items():
        check_value(flag, getattr(args, name), is_path=names_path(name))
    # Not every command has the groups of the flags below.
    if getattr(args, "branches", None):
        check_file("--branches", args.branches, "a table of branches")
    for name in _ROW_FILES:
        for path in getattr(args, name, None) or []:
            if not os.path.isdir(path):  # the reader has words of its own for a folder
                check_file(flag_of(name), path, "a .jsonl or .parquet file")
    return args, given


def add_camopd_arguments(
    parser: ArgumentParser, groups: Sequence[type[Settings]], choices: Mapping[str, Sequence[str]]
) -> ArgumentParser:
    """Add the flags of ``groups`` to Megatron's ``parser`` and set our defaults of Megatron's flags."""
    parser.error = _refuse  # type: ignore[method-assign]  # argparse's own prints hundreds of lines of usage first
    add_settings(parser, groups, choices)
    named = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in _DEFAULTS.items()
                      if not isinstance(value, bool))  # fmt: skip
    parser.add_argument_group("CaMOPD defaults of Megatron's flags", f"{named}; the last step is always saved")
    for action in parser._actions:  # argparse fails on a bare % in a help text, and some of Megatron's have one
        action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help) if action.help else action.help
    defaults = _DEFAULTS | accelerator.required_arguments()
    known = {action.dest for action in parser._actions}
    assert not defaults.keys() - known, f"Megatron no longer has {defaults.keys() - known}"
    parser.set_defaults(**defaults)
    return parser


@contextlib.contextmanager
def _words(argv: Sequence[str] | None) -> Iterator[None]:
    """Set ``sys.argv``, which Megatron's parser reads, to ``argv`` for the duration of the block."""
    before = sys.argv
    if argv is not None:
        sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


def _given_flags(parser: ArgumentParser, words: Sequence[str]) -> dict[str, str]:
    """Return the flags in ``words`` as written, by argument name; ``words`` have been parsed without error."""
    options = parser._option_string_actions
    written = (word.split("=")[0] for word in words)
    return {options[flag].dest: flag for flag in written if flag in options}


def _refuse(message: str) -> NoReturn:
    """Raise argparse's error ``message`` as ConfigurationError, in one line."""
    raise ConfigurationError(one_line(message))
