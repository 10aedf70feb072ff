"""Start of a command: its inputs read, what it writes locked, its checkpoints verified."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_camopd.checkpoint.arguments import run_folder_changed
from megatron_camopd.checkpoint.integrity import verify
from megatron_camopd.runtime.lock import locked
from megatron_camopd.runtime.rendezvous import process_number
from megatron_camopd.stages.arguments import parse_arguments
from megatron_camopd.stages.registry import STAGES, describe_stage, plan_stage, run_stage
from megatron_camopd.stages.settings import StageSettings


def run_command(argv: Sequence[str] | None = None) -> str | None:
    """Run the command line ``argv`` (default: this process's) to its end.

    Returns:
        The text of a dry run, on rank 0, else None.

    Raises:
        ConfigurationError: Names the flag or file.
        TrainingDivergedError, SaveError, InterruptedRunError, RolloutError, StaleEngineError: As the stage.
    """
    args = parse_arguments(argv)
    if StageSettings.of(args).dry_run is not None:
        args, plan = _verified(argv, args)
        return describe_stage(args, plan) if process_number() == 0 else None
    with _output_lock(args):
        if run_folder_changed(args):  # a run that ended meanwhile has saved
            args = parse_arguments(argv)
        args, plan = _verified(argv, args)
        run_stage(args, plan)
    return None


def _verified(argv: Sequence[str] | None, args: Namespace) -> tuple[Namespace, Any]:
    """Read all inputs and hash the checkpoints among them, with the next older one while the run's own is damaged."""
    passed_over: dict[int, str] = {}
    while True:
        plan = plan_stage(args)
        damaged = verify(plan.checkpoints, args.resumed)
        if not damaged:
            return args, plan
        passed_over |= damaged
        args = parse_arguments(argv, passed_over)


@contextlib.contextmanager
def _output_lock(args: Namespace) -> Iterator[None]:
    """Hold the lock on what the stage writes, on rank 0."""
    if process_number():
        yield
        return
    with locked(*STAGES[args.stage].lock(args)):
        yield
