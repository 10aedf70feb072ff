"""Settings of sampling, which rollout engines and scoring passes share."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_camopd.config.settings import Settings, above, at_least, setting
from megatron_camopd.errors import ConfigurationError

_LOWEST_TEMPERATURE = 1e-3  # below it float32 has no digits left of a log-probability


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """CaMOPD sampling: responses of the student."""

    rollout_temperature: float = setting(1.0, within=above(0), kept=True)
    """sampling temperature, above 0"""

    max_response_length: int = setting(32768, within=at_least(1), kept=True)
    """tokens of a response at most"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check the ranges; a temperature may not be so low that log-probabilities lose their digits."""
        super().check(args, given)
        if args.rollout_temperature < _LOWEST_TEMPERATURE:
            raise ConfigurationError(
                f"--rollout-temperature {args.rollout_temperature}: is too low for float32 log-probabilities; must be "
                f"at least {_LOWEST_TEMPERATURE}"
            )
