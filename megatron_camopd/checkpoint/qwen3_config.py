"""Dense Qwen3: the architecture that a config.json states, and Megatron's arguments for it.

Read strictly: a config with anything that the converters and the Megatron model would not reproduce (rope scaling,
sliding windows, attention bias, quantised weights, another activation or model type) is refused, not approximated.
Configs of transformers 4 (``rope_theta``, ``torch_dtype``) and 5 (``rope_parameters``, ``dtype``) are both read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_camopd.errors import ConfigurationError

VOCABULARY_MULTIPLE = 128
"""Vocabulary rows are padded to a multiple of this, so that every tensor-parallel size 2^k <= 128 divides them."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Qwen3Architecture:
    """Sizes of a dense Qwen3 model, as config.json states them. ``dtype`` is None if config.json names none."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    tied: bool
    dtype: torch.dtype | None

    @property
    def padded_vocab_size(self) -> int:
        """V': ``vocab_size`` rounded up to a multiple of :data:`VOCABULARY_MULTIPLE` rows."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def read_architecture(config: Mapping[str, Any], *, source: str = "config.json") -> Qwen3Architecture:
    """Read the architecture of a dense Qwen3 ``config`` (the parsed config.json).

    Errors: ConfigurationError naming ``source``, the field, its value and what is supported: another model type, rope
    scaling, sliding windows, attention bias, another activation, quantised weights, absent or impossible sizes.
    """
    _refuse_unsupported(config, source)
    sizes = {
        field: _positive_int(config, field, source)
        for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        + ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")
    }
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise _unsupported(source, "num_key_value_heads", sizes["num_key_value_heads"],
                           f"a divisor of num_attention_heads {sizes['num_attention_heads']}")  # fmt: skip
    return Qwen3Architecture(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=sizes["vocab_size"],
        max_positions=sizes["max_position_embeddings"],
        rope_theta=_rope_theta(config, source),
        norm_epsilon=_positive_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", source),
        tied=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config, source),
    )


def architecture_args(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments, by ``args`` attribute name, for the model that ``hf_config`` (config.json) describes.

    The importer writes them into the checkpoint. ``--use-checkpoint-args`` of Megatron-core 0.19 leaves out
    ``qk_layernorm``, ``layernorm_epsilon``, ``vocab_size`` and ``make_vocab_size_divisible_by``; a trainer sets
    those from here (config.json lies in ``<checkpoint>/hf``).
    """
    arch = read_architecture(hf_config)
    theta = arch.rope_theta
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_heads,
        "group_query_attention": True,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "max_position_embeddings": arch.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "qk_layernorm": True,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not arch.tied,
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": arch.padded_vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "tokenizer_type": "HuggingFaceTokenizer",
    }


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    if config.get("model_type") != "qwen3":
        raise _unsupported(source, "model_type", config.get("model_type"), "'qwen3' (dense Qwen3)")
    if config.get("hidden_act", "silu") != "silu":
        raise _unsupported(source, "hidden_act", config["hidden_act"], "'silu'")
    for field in ("attention_bias", "use_sliding_window"):
        if config.get(field):
            raise _unsupported(source, field, config[field], "false")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise _unsupported(source, "layer_types", sorted(set(config["layer_types"])), "only 'full_attention'")
    if config.get("quantization_config"):
        raise _unsupported(source, "quantization_config", config["quantization_config"], "none (bf16 or fp32 weights)")


def _rope_theta(config: Mapping[str, Any], source: str) -> float:
    """Theta from ``rope_parameters`` (transformers 5) or ``rope_theta``; anything but plain rope is refused."""
    parameters: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        value = config.get(field) or {}
        if not isinstance(value, dict):
            raise _unsupported(source, field, value, "an object with rope_type 'default'")
        kind = value.get("rope_type", value.get("type", "default"))
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        if kind != "default" or any(v != plain.get(k, v if k == "rope_theta" else None) for k, v in value.items()):
            raise _unsupported(source, field, value, "plain rope: rope_type 'default' and no scaling")
        parameters |= value
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    return _positive_number(theta, "rope_theta", source)


def _dtype(config: Mapping[str, Any], source: str) -> torch.dtype | None:
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(field)
    if name is None:
        return None
    if name not in _DTYPES:
        raise _unsupported(source, field, name, " or ".join(repr(known) for known in _DTYPES))
    return _DTYPES[name]


def _positive_int(config: Mapping[str, Any], field: str, source: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unsupported(source, field, value, "a positive integer")
    return value


def _positive_number(value: Any, field: str, source: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _unsupported(source, field, value, "a positive number")
    return float(value)


def _unsupported(source: str, field: str, value: Any, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{source}: {field} is {value!r}; expected {expected}")
