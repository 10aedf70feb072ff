"""Parsing and checking of a run's command line, before anything is built or written.

Subpackages declare their settings. This module adds their flags to Megatron's and calls the checks of each. Three flags
choose among parts that have settings of their own: ``--stage``, ``--distill-method`` and ``--rollout-engine``. Flags of
a part that is not chosen would have no effect and are refused.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence

from megatron_camopd.checkpoint.arguments import complete_arguments
from megatron_camopd.config import checks, megatron_flags
from megatron_camopd.config.command_line import parse_command_line
from megatron_camopd.config.megatron_numbers import check_finite, check_ranges
from megatron_camopd.config.resume import kept_settings
from megatron_camopd.config.settings import Settings
from megatron_camopd.data.chat import ChatSettings
from megatron_camopd.model.output_head import HeadSettings
from megatron_camopd.model.packing import PackingSettings
from megatron_camopd.objective.registry import METHODS
from megatron_camopd.rollout.registry import ENGINES
from megatron_camopd.runtime import accelerator
from megatron_camopd.stages.registry import STAGES
from megatron_camopd.stages.settings import StageSettings

CHOICES: dict[str, Mapping[str, Sequence[type[Settings]]]] = {
    "stage": {name: stage.settings for name, stage in STAGES.items()},
    "distill_method": {name: method.settings for name, method in METHODS.items()},
    "rollout_engine": {name: engine.settings for name, engine in ENGINES.items()},
}
"""Arguments that decide which settings have an effect: for each of their values, the settings that it reads."""

SHARED: tuple[type[Settings], ...] = (StageSettings, ChatSettings, HeadSettings, PackingSettings)
"""Settings that every run reads."""

GROUPS = tuple(
    dict.fromkeys([*SHARED, *(cls for options in CHOICES.values() for each in options.values() for cls in each)])
)
"""All settings, each once."""


def parse_arguments(argv: Sequence[str] | None = None, passed_over: Mapping[int, str] | None = None) -> Namespace:
    """Parse and check ``argv`` (default: the command line); starts no process group and writes nothing.

    Args:
        argv: The words of the command line, without the program's name.
        passed_over: Iterations in ``--save`` that are damaged, and why; a run goes on from an older one.

    Returns:
        Megatron's validated namespace with the arguments of all settings. Two more attributes are ``resume``, whether
        the run continues the checkpoint in ``--save``, and ``kept_settings``, the settings that such a checkpoint must
        have been made with.

    Raises:
        ConfigurationError: Names the flag, also if it is unknown.
    """
    args, given = parse_command_line(argv, GROUPS, {name: tuple(options) for name, options in CHOICES.items()})
    args.passed_over = dict(passed_over or {})
    if args.dry_run:
        StageSettings.check(args, given)
        args.world_size = args.dry_run
    accelerator.check_arguments(args)
    stage = STAGES[args.stage]
    for name, options in CHOICES.items():
        checks.check_relevance(name, options, args, given)
    checks.refuse_given(
        stage.unused_megatron_flags, given, f"has no effect with --stage {args.stage}; drop one of the two"
    )
    megatron_flags.check_flags(args, given)
    checks.check_processes(args)
    checks.check_experts(args, given)
    check_ranges(args)
    settings = settings_in_use(args)
    for group in settings:
        group.check(args, given)
    check_finite(args, given, {name for group in settings for name in group.infinite_arguments()})
    stage.check(args)
    checks.check_schedules(args)
    if args.lr_decay_style == "constant" and args.lr_decay_iters is None and args.lr_warmup_fraction is None:
        args.lr_decay_iters = args.lr_warmup_iters + 1  # without effect, but Megatron demands more than the warm-up
    complete_arguments(args, given)
    for group in settings:
        group.check_run(args)
    args.kept_settings = kept_settings(args, [*SHARED, *stage.settings], stage.kept_megatron_flags)
    return args


def settings_in_use(args: Namespace) -> list[type[Settings]]:
    """Return the settings that have an effect in a run with these arguments."""
    unused = {
        cls
        for name, options in CHOICES.items()
        for each in options.values()
        for cls in each
        if cls not in options[getattr(args, name)]
    }
    return [cls for cls in GROUPS if cls not in unused]
