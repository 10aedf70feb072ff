"""The branches of a run, and which of them a step serves.

A branch is a stream of prompts, the teacher that scores the student's responses to them, and how those samples are
ranked and weighed: :class:`BranchSpec`. A run has a table of any number of branches; a sample carries its branch as an
index into that table. Two schedules say how many prompts of each branch a step takes:

    S = G x n_g, D x n_d, G x n_g, ...      (Eq. 3; default "3-1": G G G D G G G D ...)     AlternatingSchedule
    S = G+D, G+D, ...                       prompts of all branches in fixed shares         MixedSchedule

Steps count from 0. What a step serves depends on its number alone, so the schedule is known ahead (the next teacher can
be prefetched), a resumed run continues exactly, and no schedule has state to save.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_camopd.errors import ConfigurationError

INITIAL_TEACHER = "initial"
"""In place of a checkpoint directory: the student's initial weights are the teacher."""


class ScoreRule(enum.Enum):
    """How a branch ranks its samples by the gap between teacher and student."""

    ABSOLUTE = "absolute"
    """Eq. 4: mean absolute gap; any disagreement is something to recover."""
    POSITIVE = "positive"
    """Eq. 5: mean positive part of the gap; only what the student now likes less than the teacher."""


class Branch(enum.Enum):
    """The two branches of the paper: general recovery and domain preservation."""

    GENERAL = "general"
    DOMAIN = "domain"

    @property
    def score(self) -> ScoreRule:
        """The score rule of the branch in the paper."""
        return ScoreRule.ABSOLUTE if self is Branch.GENERAL else ScoreRule.POSITIVE


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """One branch of a run.

    name            of the branch, in metrics, prompts and checkpoints
    prompts         prompt files
    teacher         checkpoint directory, or :data:`INITIAL_TEACHER`
    steps           alternating schedules: steps in a row
    share           mixed schedules: prompts of a step, in proportion to the other branches' shares
    score           how samples are ranked
    mass_target     rho_b in (0, 1]: share of the summed score that the selected samples cover
    feedback_scale  r_b: factor of the branch's loss
    """

    name: str
    prompts: tuple[str, ...] = ()
    teacher: str = INITIAL_TEACHER
    steps: int = 1
    share: int = 1
    score: ScoreRule = ScoreRule.ABSOLUTE
    mass_target: float = 0.8
    feedback_scale: float = 1.0


class Schedule(Protocol):
    """What a step serves; see the module's docstring."""

    def counts(self, step: int, batch_size: int) -> tuple[int, ...]:
        """Return how many of the ``batch_size`` prompts of ``step`` each branch gives, in the order of the table.

        The global batch holds its branches one after the other in the same order.
        """
        ...


class AlternatingSchedule:
    """One branch a step, each for its number of steps in a row, in the order of the table (Eq. 3).

    Args:
        steps: steps in a row of each branch; 0 for a branch that is never served. The sum is positive.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        assert min(steps) >= 0 and sum(steps) > 0, steps
        self._served = [branch for branch, count in enumerate(steps) for _ in range(count)]
        self._branches = len(steps)

    def branch_index(self, step: int) -> int:
        """Return the branch of step ``step`` (0, 1, 2, ...). Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        return self._served[step % len(self._served)]

    def counts(self, step: int, batch_size: int) -> tuple[int, ...]:
        """See :meth:`Schedule.counts`: all prompts of a step come from one branch."""
        served = self.branch_index(step)
        return tuple(batch_size if branch == served else 0 for branch in range(self._branches))


class BranchSchedule(AlternatingSchedule):
    """The alternating schedule of the paper's two branches.

    Args:
        recovery_steps: n_g, general steps in a row.
        preservation_steps: n_d, domain steps in a row. Either may be 0 (that branch never runs), not both.

    Raises:
        ConfigurationError: one is negative, or both are 0.
    """

    def __init__(self, recovery_steps: int = 3, preservation_steps: int = 1) -> None:
        check_two_branch_steps(recovery_steps, preservation_steps)
        super().__init__([recovery_steps, preservation_steps])

    def branch(self, step: int) -> Branch:
        """Return the branch of step ``step`` (0, 1, 2, ...). Raises ValueError for a negative step."""
        return (Branch.GENERAL, Branch.DOMAIN)[self.branch_index(step)]


def check_two_branch_steps(recovery_steps: int, preservation_steps: int) -> None:
    """Raise ConfigurationError where one of the two numbers is negative, or both are 0."""
    for flag, value in (("--recovery-steps", recovery_steps), ("--preservation-steps", preservation_steps)):
        if value < 0:
            raise ConfigurationError(f"{flag} is {value}; it must be 0 or more")
    if recovery_steps == 0 and preservation_steps == 0:
        raise ConfigurationError("--recovery-steps 0 and --preservation-steps 0: at least one must be positive")


class MixedSchedule:
    """All branches in every step, in fixed shares.

    Args:
        shares: of each branch; 0 for one that is never served. The sum is positive.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        assert min(shares) >= 0 and sum(shares) > 0, shares
        self._shares = tuple(shares)

    def divides(self, batch_size: int) -> bool:
        """Whether a batch of ``batch_size`` prompts divides as the shares do."""
        return all(batch_size * share % sum(self._shares) == 0 for share in self._shares)

    def counts(self, step: int, batch_size: int) -> tuple[int, ...]:
        """See :meth:`Schedule.counts`: the same in every step."""
        assert self.divides(batch_size), (batch_size, self._shares)
        return tuple(batch_size * share // sum(self._shares) for share in self._shares)
