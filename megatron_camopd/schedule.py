"""Which branch a step serves: general recovery n_g times, then domain preservation n_d times, repeated.

    S = G x n_g, D x n_d, G x n_g, ...      (Eq. 3; default "3-1": G G G D G G G D ...)

Steps count from 0. The branch depends on the step's number alone, so the schedule is known ahead (the next teacher can
be prefetched) and a resumed run continues exactly. What a checkpoint must keep is therefore only the two settings:
resuming with other ones would shift every later step, and is refused.
"""

from collections.abc import Mapping

from megatron_camopd.batch import Branch
from megatron_camopd.errors import ConfigurationError

__all__ = ["Branch", "BranchSchedule"]


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
            raise ConfigurationError(
                "--recovery-steps and --preservation-steps are both 0; at least one must be positive"
            )
        self.recovery_steps = recovery_steps
        self.preservation_steps = preservation_steps

    def branch(self, step: int) -> Branch:
        """The branch of step ``step`` (0, 1, 2, ...). Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        position = step % (self.recovery_steps + self.preservation_steps)
        return Branch.GENERAL if position < self.recovery_steps else Branch.DOMAIN

    def state_dict(self) -> dict[str, int]:
        """The settings, for the training state."""
        return {"recovery_steps": self.recovery_steps, "preservation_steps": self.preservation_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Check that a checkpoint was made with these settings. Raises ConfigurationError where they differ."""
        for name, value in self.state_dict().items():
            if state[name] != value:
                flag = "--" + name.replace("_", "-")
                raise ConfigurationError(f"{flag} is {value}, but the checkpoint was made with {state[name]}; use that")
