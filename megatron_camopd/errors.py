"""Errors that a user of the command line is meant to read.

A mistake in flags or files raises :class:`ConfigurationError`; its text is one line that names the flag or
file, the value found, and what would be right. The entry points print that line and exit with status 2.
``assert`` is kept for invariants of this code base.
"""


class ConfigurationError(ValueError):
    """A flag, a file or a combination of them cannot work as given."""


class TrainingDivergedError(RuntimeError):
    """Loss or gradients stayed non-finite for more consecutive steps than the user allows."""


class StaleEngineError(RuntimeError):
    """The rollout engine, or the weights on their way to it, are not the student's of this step: nothing is sampled."""


class RolloutError(RuntimeError):
    """The rollout engine failed to sample a step's responses or to take over the weights; the trainer is unharmed."""


class EngineLostError(RolloutError):
    """One rank failed while the others of its engine are stuck in it: nothing collective is possible, no checkpoint."""
