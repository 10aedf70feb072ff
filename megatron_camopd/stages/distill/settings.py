"""Settings of distillation that belong to no other subpackage."""

from dataclasses import dataclass

from megatron_camopd.config.settings import Settings, at_least, setting


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """CaMOPD method: what is trained on (paper, section 3.3)."""

    distill_method: str = setting("camopd", kept=True)
    """objective of the run: camopd alternates branches and selects samples; the others train all branches in every
    step, all samples (mopd), tokens by reward and entropy (relaxed-opd) or tokens that the teacher verifies
    (selectkd)"""

    rollout_mismatch_warning: float | None = setting(None, within=at_least(0), metavar="NATS")
    """warn when |log mu - log pi| of engine and trainer is larger on average (default: 2e-4 in float32, 0.02 in
    float16, 0.1 in bfloat16)"""
