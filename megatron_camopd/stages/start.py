"""Start of a command: its inputs read, what it writes locked, its checkpoints verified."""

import contextlib
import hashlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_camopd.checkpoint.arguments import run_folder_changed
from megatron_camopd.checkpoint.integrity import verify
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime.collectives import different_inputs
from megatron_camopd.runtime.lock import locked
from megatron_camopd.runtime.rendezvous import exchange, process_number, require_launcher
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
    require_launcher()
    with contextlib.ExitStack() as stack:
        problem = None
        try:
            stack.enter_context(_output_lock(args))
            if run_folder_changed(args):  # a run that ended meanwhile has saved
                args = parse_arguments(argv)
        except ConfigurationError as error:
            problem = str(error)
        _agree(problem, "")
        args, plan = _verified(argv, args)
        run_stage(args, plan)
    return None


def _verified(argv: Sequence[str] | None, args: Namespace) -> tuple[Namespace, Any]:
    """Read all inputs and hash the checkpoints among them, with the next older one while the run's own is damaged."""
    while True:
        plan, problem = None, None
        try:
            plan = plan_stage(args)
        except ConfigurationError as error:
            problem = str(error)
        _agree(problem, "" if plan is None else plan.fingerprint())
        assert plan is not None, "else a problem was raised"
        damaged = verify(plan.checkpoints, args.resumed)
        if not damaged:
            return args, plan
        args = parse_arguments(argv, args.passed_over | damaged)


def _agree(problem: str | None, plan: str) -> None:
    """End all processes with the problem of the lowest that has one, or if their plans differ; collective.

    One process alone takes the lock and checks the rows; without this the others would wait for it in vain.
    """
    given = exchange("inputs", [problem, hashlib.sha256(plan.encode()).hexdigest()])
    first = next((found for found, _ in given if found is not None), None)
    if first is not None:
        raise ConfigurationError(first)
    others = [rank for rank, (_, digest) in enumerate(given) if digest != given[0][1]]
    if others:
        raise ConfigurationError(different_inputs("checkpoints, data or settings", others))


@contextlib.contextmanager
def _output_lock(args: Namespace) -> Iterator[None]:
    """Hold the lock on what the stage writes, on rank 0."""
    if process_number():
        yield
        return
    with locked(*STAGES[args.stage].lock(args)):
        yield
