"""Architecture of a dense Qwen3 from its config.json, and Megatron's arguments for it.

The reader is strict: it refuses a config with anything that the converters and the Megatron model do not reproduce
(rope scaling, sliding windows, attention bias, quantised weights, another activation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_camopd.families import config_fields
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.model_arguments import decoder_arguments


def read_architecture(config: Mapping[str, Any], *, source: str = "config.json") -> Architecture:
    """Read the architecture of a dense Qwen3 from ``config`` (the parsed config.json).

    Raises:
        ConfigurationError: The config asks for something that is not supported, or a size is absent or impossible; the
            error names ``source``, the field, its value and what is expected.
    """
    config_fields.refuse_other_activations(config, source)
    config_fields.refuse_switches(config, source, ("attention_bias", "use_sliding_window"))
    config_fields.refuse_partial_attention(config, source)
    config_fields.refuse_quantised_weights(config, source)
    return Architecture(
        **config_fields.decoder_fields(config, source), rope_theta=config_fields.plain_rope_theta(config, source)
    )


def megatron_arguments(arch: Architecture) -> dict[str, Any]:
    """Return Megatron's arguments, by ``args`` attribute name, for a dense Qwen3 of ``arch``."""
    return decoder_arguments(arch, qk_layernorm=True, add_qkv_bias=False)
