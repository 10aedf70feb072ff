"""The interface between a stage and the command that runs it."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_camopd.checkpoint.directory import CheckpointLocation
from megatron_camopd.config.settings import Settings


class Plan(Protocol):
    """The checked inputs of a stage.

    Attributes:
        checkpoints: The checkpoints that the stage loads, by the text that names their flag and folder in errors.
    """

    checkpoints: dict[str, CheckpointLocation]

    def fingerprint(self) -> str:
        """Return a text that is equal on ranks with equal plans."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One value of ``--stage``.

    Attributes:
        settings: The settings that the stage reads, beside those that every stage reads.
        check: Function that checks files and arguments against each other, and sets ``args.resume``.
        plan: Function that reads and checks all inputs and returns the plan.
        run: Function that runs the stage to its end; collective.
        describe: Function that returns the lines of a dry run.
        lock: Function that returns the lock file of what the stage writes, and the flag and value to name it by.
        unused_megatron_flags: Names of Megatron's arguments that have no effect in the stage and are refused.
        kept_megatron_flags: Names of Megatron's arguments that a resumed run must keep, beside those of every stage.
    """

    settings: tuple[type[Settings], ...]
    check: Callable[[Namespace], None]
    plan: Callable[[Namespace], Any]
    run: Callable[[Namespace, Any], None]
    describe: Callable[[Namespace, Any], list[str]]
    lock: Callable[[Namespace], tuple[Path, str]]
    unused_megatron_flags: tuple[str, ...] = ()
    kept_megatron_flags: tuple[str, ...] = ()
