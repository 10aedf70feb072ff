"""The branches of a run, and the schedules that decide which of them a step serves.

A branch (:class:`BranchSpec`) has prompts, the teacher that scores the student's responses to them, and the rules by
which those samples are ranked and weighted. A run has a table of any number of branches; a sample carries its branch as
an index into that table. A schedule says how many prompts of each branch a step takes. There are two:

    S = G x n_g, D x n_d, G x n_g, ...      (Eq. 3; default "3-1": G G G D G G G D ...)     AlternatingSchedule
    S = G+D, G+D, ...                       prompts of all branches in fixed shares         MixedSchedule

Steps count from 0. The branches of a step depend only on its number. The schedule is therefore known in advance (the
next teacher can be prefetched), and a resumed run continues it without saved state.
"""

import bisect
import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_camopd.errors import ConfigurationError

INITIAL_TEACHER = "initial"
"""The value of ``teacher`` that stands for the student's initial weights instead of a checkpoint directory."""


class ScoreRule(enum.Enum):
    """Rule by which a branch ranks its samples from the gap between teacher and student."""

    ABSOLUTE = "absolute"
    """Mean absolute gap (Eq. 4), which counts disagreement in both directions."""
    POSITIVE = "positive"
    """Mean positive part of the gap (Eq. 5), which counts tokens less likely under the student than the teacher."""


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

    Attributes:
        name: Name of the branch in metrics, prompts and checkpoints.
        prompts: Paths of the prompt files.
        teacher: Checkpoint directory, or :data:`INITIAL_TEACHER`.
        steps: Number of steps in a row, in an alternating schedule.
        share: Prompts in a step relative to the shares of the other branches, in a mixed schedule.
        score: Rule by which samples are ranked.
        mass_target: rho_b in (0, 1], the share of the summed score that the selected samples cover.
        feedback_scale: r_b, the factor of the branch's loss.
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
    """The schedule of a run: how many prompts of each branch a step takes."""

    def counts(self, step: int, batch_size: int) -> tuple[int, ...]:
        """Return how many of the ``batch_size`` prompts of ``step`` each branch gets, in the order of the table.

        The global batch holds the samples of its branches one after the other, in the same order.
        """
        ...

    def tally(self, steps: int, batch_size: int) -> dict[tuple[int, ...], int]:
        """Return how many of the first ``steps`` steps take which counts; the time does not depend on ``steps``."""
        ...


class AlternatingSchedule:
    """Schedule with one branch per step; branches take turns for their numbers of steps in a row (Eq. 3).

    Args:
        steps: Number of steps in a row of each branch, in the order of the table; 0 for a branch that is never served.
            The sum must be positive.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        assert min(steps) >= 0 and sum(steps) > 0, steps
        self._steps = tuple(steps)
        self._ends = tuple(itertools.accumulate(steps))

    def branch_index(self, step: int) -> int:
        """Return the index in the table of the branch that ``step`` serves.

        Raises:
            ValueError: The step is negative.
        """
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        return bisect.bisect_right(self._ends, step % self._ends[-1])

    def counts(self, step: int, batch_size: int) -> tuple[int, ...]:
        """Return the number of prompts of each branch in ``step``: ``batch_size`` for one, 0 for the others."""
        return self._counts_of(self.branch_index(step), batch_size)

    def tally(self, steps: int, batch_size: int) -> dict[tuple[int, ...], int]:
        """Return how many of the first ``steps`` steps serve each branch, by the counts of those steps."""
        cycles, rest = divmod(steps, self._ends[-1])
        numbers = [
            cycles * count + min(max(rest - (end - count), 0), count)
            for count, end in zip(self._steps, self._ends, strict=True)
        ]
        return {self._counts_of(branch, batch_size): number for branch, number in enumerate(numbers) if number}

    def _counts_of(self, served: int, batch_size: int) -> tuple[int, ...]:
        return tuple(batch_size if branch == served else 0 for branch in range(len(self._steps)))


class BranchSchedule(AlternatingSchedule):
    """The alternating schedule of the paper's two branches.

    Args:
        recovery_steps: n_g, the number of general steps in a row; 0 if the general branch is never served.
        preservation_steps: n_d, the number of domain steps in a row; 0 if the domain branch is never served.

    Raises:
        ConfigurationError: One of the numbers is negative, or both are 0.
    """

    def __init__(self, recovery_steps: int = 3, preservation_steps: int = 1) -> None:
        check_two_branch_steps(recovery_steps, preservation_steps)
        super().__init__([recovery_steps, preservation_steps])

    def branch(self, step: int) -> Branch:
        """Return the branch that ``step`` serves.

        Raises:
            ValueError: The step is negative.
        """
        return (Branch.GENERAL, Branch.DOMAIN)[self.branch_index(step)]


def check_two_branch_steps(recovery_steps: int, preservation_steps: int) -> None:
    """Check the numbers of steps of the paper's two branches.

    Raises:
        ConfigurationError: One of the numbers is negative, or both are 0.
    """
    for flag, value in (("--recovery-steps", recovery_steps), ("--preservation-steps", preservation_steps)):
        if value < 0:
            raise ConfigurationError(f"{flag} is {value}; it must be 0 or more")
    if recovery_steps == 0 and preservation_steps == 0:
        raise ConfigurationError("--recovery-steps 0 and --preservation-steps 0: at least one must be positive")


class MixedSchedule:
    """Schedule with all branches in every step, in fixed shares.

    Args:
        shares: Share of each branch, in the order of the table; 0 for a branch that is never served. The sum must be
            positive.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        assert min(shares) >= 0 and sum(shares) > 0, shares
        self._shares = tuple(shares)

    def divides(self, batch_size: int) -> bool:
        """Return whether the shares of a batch of ``batch_size`` prompts are whole numbers of prompts."""
        return all(batch_size * share % sum(self._shares) == 0 for share in self._shares)

    def counts(self, step: int, batch_size: int) -> tuple[int, ...]:
        """Return the number of prompts of each branch, the same in every step."""
        assert self.divides(batch_size), (batch_size, self._shares)
        return tuple(batch_size * share // sum(self._shares) for share in self._shares)

    def tally(self, steps: int, batch_size: int) -> dict[tuple[int, ...], int]:
        """Return the counts that all ``steps`` steps take, and ``steps``."""
        return {self.counts(0, batch_size): steps} if steps else {}
