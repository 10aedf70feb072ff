"""Settings of rollouts that are independent of the engine."""

from dataclasses import dataclass

from megatron_camopd.config.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """CaMOPD rollouts: responses sampled from the student."""

    rollout_engine: str = setting("megatron", kept=True)
    """engine that samples the responses: megatron, with the trained weights themselves, or vllm, in the same processes
    with its own copy of the weights (for long responses)"""
