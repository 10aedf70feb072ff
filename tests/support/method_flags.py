"""Which flags each method reads, and a value for every flag that some methods do not read."""

from typing import Any

from megatron_camopd.objective.registry import METHODS

METHOD_FLAGS = {
    name: tuple(flag for cls in kind.settings for flag in cls.argument_names()) for name, kind in METHODS.items()
}

# One value for every flag that some methods do not read.
VALUES: dict[str, Any] = {
    "recovery_steps": 2, "preservation_steps": 2, "general_mass_target": 0.5, "domain_mass_target": 0.5,
    "general_feedback_scale": 3.0, "domain_feedback_scale": 2.0, "unselected_samples": "keep", "mixing_ratio": "3:1",
    "relaxed_opd_floor": "logit", "relaxed_opd_lambda": 0.3, "relaxed_opd_entropy_fraction": 0.5,
    "relaxed_opd_switch_step": 1, "selectkd_verification": "speculative", "selectkd_candidates": 7,
    "selectkd_rejected_weight": 0.0,
}  # fmt: skip
