"""Counteraction-aware multi-teacher on-policy distillation (CaMOPD) on Megatron-core."""

__version__ = "0.1.0"
