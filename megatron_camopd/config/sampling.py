"""Settings of sampling, which rollout engines and scoring passes share."""

from dataclasses import dataclass

from megatron_camopd.config.settings import Settings, above, at_least, setting


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """CaMOPD sampling: responses of the student."""

    rollout_temperature: float = setting(1.0, within=above(0), kept=True)
    """sampling temperature, above 0"""

    max_response_length: int = setting(32768, within=at_least(1), kept=True)
    """tokens of a response at most"""
