"""Settings of the branches of a run: teachers, prompts, and how steps are shared among them."""

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_camopd.config.settings import Range, Settings, at_least, setting
from megatron_camopd.errors import ConfigurationError

FRACTION = Range(0, 1, open_low=True)
POSITIVE = Range(low=0, open_low=True, words="must be a positive number")


def _ratio(text: str) -> list[int]:
    """Parse ``3:1`` as [3, 1]."""
    if not re.fullmatch(r"[0-9]+:[0-9]+", text):
        raise ArgumentTypeError(f"{text!r} is not two whole numbers G:D, such as 3:1")
    return [int(number) for number in text.split(":")]


@dataclass(frozen=True, kw_only=True)
class BranchSettings(Settings):
    """CaMOPD branches: teachers are frozen Megatron checkpoints, kept in host memory.

    Prompts are JSONL or Parquet, one prompt a row.
    """

    branches: str | None = setting(None, metavar="FILE")
    """JSON or YAML with any number of branches, teachers and prompt files, in place of the flags of the two branches
    "general" and "domain" """

    general_teacher_load: str | None = setting(None, metavar="DIR")
    """checkpoint of the general model"""

    domain_teacher_load: str | None = setting(None, metavar="DIR")
    """checkpoint of the domain teacher (default: the student's initial weights)"""

    general_prompts: list[str] | None = setting(None, metavar="FILE")
    """prompts of general steps"""

    domain_prompts: list[str] | None = setting(None, metavar="FILE")
    """prompts of domain steps"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check that no flags of the two branches are given together with ``--branches``."""
        super().check(args, given)
        if args.branches is None:
            return
        two = {*cls.argument_names(), *AlternatingSettings.argument_names(), *MixingSettings.argument_names()}
        for name, flag in given.items():
            if name in two - {"branches"}:
                raise ConfigurationError(
                    f"{flag}: has no effect beside --branches {args.branches}; say it in that file"
                )


@dataclass(frozen=True, kw_only=True)
class AlternatingSettings(Settings):
    """CaMOPD schedule: one branch a step (paper, section 3.3)."""

    # A resumed run keeps these too: branch_resume compares the tables of branches that they make.

    recovery_steps: int = setting(3, within=at_least(0))
    """camopd: general steps in a row (n_g)"""

    preservation_steps: int = setting(1, within=at_least(0))
    """camopd: domain steps in a row after them"""

    general_mass_target: float = setting(0.8, within=FRACTION)
    """camopd: gap mass kept, general steps"""

    domain_mass_target: float = setting(0.8, within=FRACTION)
    """camopd: gap mass kept, domain steps"""

    general_feedback_scale: float = setting(2.0, within=POSITIVE)
    """camopd: r_g, scales general loss"""

    domain_feedback_scale: float = setting(1.0, within=POSITIVE)
    """camopd: r_d, scales domain loss"""


@dataclass(frozen=True, kw_only=True)
class MixingSettings(Settings):
    """CaMOPD mixture: both branches in every step."""

    # A resumed run keeps the ratio too: branch_resume compares the tables of branches.

    mixing_ratio: list[int] | None = setting(None, metavar="G:D", parse=_ratio, nargs=None)
    """all but camopd: general to domain prompts of every step (default: 1:1)"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Set the default ratio, which only the mixed methods have."""
        super().check(args, given)
        if args.mixing_ratio is None:
            args.mixing_ratio = [1, 1]
