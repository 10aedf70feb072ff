"""The command line: Megatron's own parser with groups of settings added, and defaults that suit distillation.

Megatron's flags keep their names and meaning. Where Megatron's default cannot serve distillation (dropout, fatal NaN
checks, reshardable optimizer checkpoints) or this machine (no CUDA), another default is set on the parser, so an
explicit flag still wins.
"""

import contextlib
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron_camopd.config.settings import Settings, add_settings
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator

# What differs from Megatron's defaults everywhere, and why.
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
    # A run may be given more steps later; whether its settings are the same ones is checked here, flag by flag.
    "override_opt_param_scheduler": True,
    "save_interval": 20,  # a failure costs at most these steps; the last step is always saved
    "micro_batch_size": 1,
    # The paper's training settings (appendix A).
    "global_batch_size": 512,
    "train_iters": 120,
    "lr": 2e-6,
    "lr_decay_style": "constant",
}


def parse_command_line(
    argv: Sequence[str] | None, groups: Sequence[type[Settings]], choices: Mapping[str, Sequence[str]]
) -> tuple[Namespace, dict[str, str]]:
    """Parse ``argv`` (default: the command line) with Megatron's parser and the flags of ``groups``.

    Args:
        argv: words of the command line, without the program's name.
        groups: settings whose flags are added.
        choices: the values of arguments that a registry knows, by argument name.

    Returns:
        Megatron's namespace, not validated yet, and the flags that were given: argument name -> flag as written.

    Raises:
        ConfigurationError: an unknown flag, or a value that is none.
    """
    accelerator.activate()
    from megatron.training.arguments import parse_args  # imported here: accelerator.activate() comes first

    parsers: list[ArgumentParser] = []

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        return add_camopd_arguments(parser, groups, choices)

    with _words(argv):
        if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv):  # Megatron would drop all flags for it
            raise ConfigurationError("--yaml-cfg: not supported by CaMOPD training; give the settings as flags")
        args = parse_args(add_arguments)
        return args, _given_flags(parsers[0], sys.argv[1:])


def add_camopd_arguments(
    parser: ArgumentParser, groups: Sequence[type[Settings]], choices: Mapping[str, Sequence[str]]
) -> ArgumentParser:
    """Add the flags of ``groups`` to Megatron's ``parser`` and set this project's defaults of Megatron's flags."""
    parser.error = _refuse  # type: ignore[method-assign]  # its own prints hundreds of lines of usage first
    add_settings(parser, groups, choices)
    named = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in _DEFAULTS.items()
                      if not isinstance(value, bool))  # fmt: skip
    parser.add_argument_group("CaMOPD defaults of Megatron's flags", f"{named}; the last step is always saved")
    for action in parser._actions:  # a bare % in one of Megatron's own texts would end --help in a traceback
        action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help) if action.help else action.help
    defaults = _DEFAULTS | accelerator.required_arguments()
    known = {action.dest for action in parser._actions}
    assert not defaults.keys() - known, f"Megatron no longer has {defaults.keys() - known}"
    parser.set_defaults(**defaults)
    return parser


@contextlib.contextmanager
def _words(argv: Sequence[str] | None) -> Iterator[None]:
    """Let Megatron's parser, which reads ``sys.argv``, read ``argv``."""
    before = sys.argv
    if argv is not None:
        sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


def _given_flags(parser: ArgumentParser, words: Sequence[str]) -> dict[str, str]:
    """Return the flags in ``words``, which did parse: argument name -> flag as written there."""
    options = parser._option_string_actions
    written = (word.split("=")[0] for word in words)
    return {options[flag].dest: flag for flag in written if flag in options}


def _refuse(message: str) -> NoReturn:
    """Raise what argparse found wrong with the command line."""
    raise ConfigurationError(" ".join(message.split()))
