"""Errors that a user of the command line is meant to read.

A mistake in flags or files raises :class:`ConfigurationError`; its text is one line that names the flag or
file, the value found, and what would be right. The entry points print that line and exit with status 2.
``assert`` is kept for invariants of this code base.
"""


class ConfigurationError(ValueError):
    """A flag, a file or a combination of them cannot work as given."""


class TrainingDivergedError(RuntimeError):
    """Loss or gradients stayed non-finite for more consecutive steps than the user allows."""
