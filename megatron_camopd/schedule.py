"""Which branches a step serves: one of them in turn, or both at once.

    S = G x n_g, D x n_d, G x n_g, ...      (Eq. 3; default "3-1": G G G D G G G D ...)     BranchSchedule
    S = G+D, G+D, ...                       prompts of both branches in a fixed ratio       MixedSchedule

Steps count from 0. What a step serves depends on its number alone, so the schedule is known ahead (the next teacher can
be prefetched) and a resumed run continues exactly. What a checkpoint must keep is therefore only the settings: resuming
with other ones would shift every later step, and is refused.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Protocol

from megatron_camopd.batch import Branch
from megatron_camopd.errors import ConfigurationError

__all__ = ["Branch", "BranchSchedule", "MixedSchedule", "Schedule", "schedule_of"]


class Schedule(Protocol):
    """What both schedules offer."""

    branches: tuple[Branch, ...]
    """The branches that any step serves, the general one first."""

    def composition(self, step: int, batch_size: int) -> dict[Branch, int]:
        """How many of a step's ``batch_size`` prompts each branch gives, in the order of the global batch."""
        ...

    def state_dict(self) -> dict[str, int]:
        """The settings, for the training state."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Check that a checkpoint was made with these settings. Raises ConfigurationError where they differ."""
        ...


def schedule_of(args: Namespace) -> Schedule:
    """The schedule that the flags ask for: mixed where there is a mixing ratio. Raises ConfigurationError."""
    if args.mixing_ratio is not None:
        return MixedSchedule(*args.mixing_ratio)
    return BranchSchedule(args.recovery_steps, args.preservation_steps)


class BranchSchedule:
    """The alternating schedule of Eq. 3.

    recovery_steps: n_g, general steps in a row; preservation_steps: n_d, domain steps in a row. Either may be 0 (that
    branch never runs), not both. Raises ConfigurationError when one is negative or both are 0.
    """

    def __init__(self, recovery_steps: int = 3, preservation_steps: int = 1) -> None:
        for flag, value in (("--recovery-steps", recovery_steps), ("--preservation-steps", preservation_steps)):
            if value < 0:
                raise ConfigurationError(f"{flag} is {value}; it must be 0 or more")
        if recovery_steps == 0 and preservation_steps == 0:
            raise ConfigurationError("--recovery-steps 0 and --preservation-steps 0: at least one must be positive")
        self.recovery_steps = recovery_steps
        self.preservation_steps = preservation_steps
        self.branches = (Branch.GENERAL,) * (recovery_steps > 0) + (Branch.DOMAIN,) * (preservation_steps > 0)

    def branch(self, step: int) -> Branch:
        """The branch of step ``step`` (0, 1, 2, ...). Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        position = step % (self.recovery_steps + self.preservation_steps)
        return Branch.GENERAL if position < self.recovery_steps else Branch.DOMAIN

    def composition(self, step: int, batch_size: int) -> dict[Branch, int]:
        """The whole batch is the step's branch's."""
        return {self.branch(step): batch_size}

    def state_dict(self) -> dict[str, int]:
        """The settings, for the training state."""
        return {"recovery_steps": self.recovery_steps, "preservation_steps": self.preservation_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Check that a checkpoint was made with these settings. Raises ConfigurationError where they differ."""
        _require_same(self.state_dict(), state)


class MixedSchedule:
    """Both branches in every step, ``general`` prompts to ``domain`` prompts (``--mixing-ratio``, a pooled batch).

    Either may be 0, not both. Raises ConfigurationError when one is negative or both are 0.
    """

    def __init__(self, general: int, domain: int) -> None:
        if general < 0 or domain < 0 or general + domain == 0:
            raise ConfigurationError(
                f"--mixing-ratio {general}:{domain}: must be whole numbers of 0 or more, at least one positive"
            )
        self.shares = {Branch.GENERAL: general, Branch.DOMAIN: domain}
        self.branches = tuple(branch for branch, share in self.shares.items() if share)

    def composition(self, step: int, batch_size: int) -> dict[Branch, int]:
        """The same every step. Raises ConfigurationError for a batch that cannot be divided so."""
        total = sum(self.shares.values())
        if any(batch_size * share % total for share in self.shares.values()):
            ratio = ":".join(map(str, self.shares.values()))
            raise ConfigurationError(f"--global-batch-size {batch_size}: does not divide as --mixing-ratio {ratio}")
        return {branch: batch_size * self.shares[branch] // total for branch in self.branches}

    def state_dict(self) -> dict[str, int]:
        """The settings, for the training state."""
        return {"mixing_general": self.shares[Branch.GENERAL], "mixing_domain": self.shares[Branch.DOMAIN]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Check that a checkpoint was made with these settings. Raises ConfigurationError where they differ."""
        if self.state_dict() != dict(state):
            ratio = ":".join(map(str, self.shares.values()))
            raise ConfigurationError(f"--mixing-ratio is {ratio}, but the checkpoint was made with another; use that")


def _require_same(settings: Mapping[str, int], saved: Mapping[str, int]) -> None:
    for name, value in settings.items():
        if saved[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag} is {value}, but the checkpoint was made with {saved[name]}; use that")
