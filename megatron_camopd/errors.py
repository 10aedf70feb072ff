"""Errors that users of the command line may see.

A mistake in flags or files raises :class:`ConfigurationError`, whose text is one line that names the flag or file, the
value found, and what would be right. The entry points print that line and exit with status 2. ``assert`` is reserved
for invariants of this code base.
"""


class ConfigurationError(ValueError):
    """Error of a flag, a file, or a combination of them that cannot work."""


class TrainingDivergedError(RuntimeError):
    """Error of a run whose loss or gradients were not finite for more consecutive steps than the user allows."""


class StaleEngineError(RuntimeError):
    """Error of a rollout engine that does not hold the student's current weights, so that it must not sample."""


class RolloutError(RuntimeError):
    """Error of a rollout engine that failed to sample or to load weights, while the trainer itself is intact."""


class EngineLostError(RolloutError):
    """Error of an engine where one rank failed and the others hang, so that not even a checkpoint can be saved."""


class SaveError(RuntimeError):
    """Error of a run that cannot write its checkpoint or records; the checkpoints before are intact."""


class InterruptedRunError(RuntimeError):
    """A signal asked the run to stop; it has saved what it had done."""
