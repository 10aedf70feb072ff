"""The interface between a stage and the command: what a stage checks, plans, runs and tells of a dry run."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_camopd.config.settings import Settings


class Plan(Protocol):
    """The checked inputs of a stage."""

    def fingerprint(self) -> str:
        """Return a text that is the same on every rank whose plan is the same."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One value of ``--stage``.

    settings: what it reads beside the settings that every stage reads. check: checks arguments that belong together,
    and files; sets ``args.resume``. plan: reads and checks all inputs. run: does the work, to its end; collective.
    describe: the lines of a dry run. unused_megatron_flags: Megatron's arguments without effect here;
    kept_megatron_flags: those that a resumed run keeps beside the usual ones.
    """

    settings: tuple[type[Settings], ...]
    check: Callable[[Namespace], None]
    plan: Callable[[Namespace], Any]
    run: Callable[[Namespace, Any], None]
    describe: Callable[[Namespace, Any], list[str]]
    unused_megatron_flags: tuple[str, ...] = ()
    kept_megatron_flags: tuple[str, ...] = ()
