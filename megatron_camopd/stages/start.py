"""Start of a command: its inputs read, what it writes locked, its checkpoints verified."""

import contextlib
import functools
import hashlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_camopd.checkpoint.arguments import run_folder_changed
from megatron_camopd.checkpoint.integrity import verify
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime.collectives import different_inputs
from megatron_camopd.runtime.lock import locked
from megatron_camopd.runtime.rendezvous import exchange, process_count, process_number, require_launcher
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
    dry_run = StageSettings.of(args).dry_run is not None
    if not dry_run or process_count() > 1:
        require_launcher()
    if dry_run:
        args, plan = _verified(argv, args)
        return describe_stage(args, plan) if process_number() == 0 else None
    with contextlib.ExitStack() as stack:
        _on_all(lambda: stack.enter_context(_output_lock(args)))
        # A run that ended while the lock was waited for has saved. All look after rank 0 has it, so all see the same.
        args = _on_all(lambda: parse_arguments(argv) if run_folder_changed(args) else args)
        args, plan = _verified(argv, args)
        run_stage(args, plan)
    return None


def _verified(argv: Sequence[str] | None, args: Namespace) -> tuple[Namespace, Any]:
    """Read all inputs and hash the checkpoints among them, with the next older one while the run's own is damaged."""
    while True:
        plan = _on_all(functools.partial(plan_stage, args), lambda plan: plan.fingerprint())
        damaged = verify(plan.checkpoints, args.resumed)
        if not damaged:
            return args, plan
        args = parse_arguments(argv, args.passed_over | damaged)


def _on_all(work: Callable[[], Any], fingerprint: Callable[[Any], str] = lambda result: "") -> Any:
    """Return what ``work`` returns; all processes end if one cannot do it, or if fingerprints differ; collective.

    One process alone takes the lock and checks the rows; without this the others would wait for it in vain.

    Raises:
        ConfigurationError: Has the problem of the lowest process that has one.
    """
    result, problem, digest = None, None, ""
    try:
        result = work()
        digest = hashlib.sha256(fingerprint(result).encode()).hexdigest()
    except ConfigurationError as error:
        problem = str(error)
    given = exchange("inputs", [problem, digest])
    first = next((found for found, _ in given if found is not None), None)
    if first is not None:
        raise ConfigurationError(first)
    others = [rank for rank, (_, other) in enumerate(given) if other != given[0][1]]
    if others:
        raise ConfigurationError(different_inputs("checkpoints, data or settings", others))
    return result


@contextlib.contextmanager
def _output_lock(args: Namespace) -> Iterator[None]:
    """Hold the lock on what the stage writes, on rank 0."""
    if process_number():
        yield
        return
    with locked(*STAGES[args.stage].lock(args)):
        yield
