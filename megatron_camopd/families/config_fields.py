"""Strict readers of the fields of config.json.

Each raises a ConfigurationError of one line, which names ``source`` (the file), the field, its value and what is
expected. Configs of transformers 4 (``rope_theta``, ``torch_dtype``) and of transformers 5 (``rope_parameters``,
``dtype``) can be read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from megatron_camopd.errors import ConfigurationError

_MOST_LAYERS, _LARGEST_SIZE = 10_000, 2**31 - 1  # beyond any model; what is larger is a damaged file
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class DecoderFields(TypedDict):
    """Fields of :class:`~.architecture.Architecture` that the config.json of every family states in the same way."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    tied: bool
    dtype: torch.dtype | None


def decoder_fields(config: Mapping[str, Any], source: str) -> DecoderFields:
    """Return the sizes, the epsilon of the norms, whether embeddings are tied, and the dtype.

    Raises:
        ConfigurationError: A size is absent or impossible, or the dtype is neither bfloat16 nor float32.
    """
    sizes = {
        field: positive_int(config, field, source)
        for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        + ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")
    }
    if sizes["num_hidden_layers"] > _MOST_LAYERS:
        raise unsupported(source, "num_hidden_layers", sizes["num_hidden_layers"], f"at most {_MOST_LAYERS:,}")
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise unsupported(source, "num_key_value_heads", sizes["num_key_value_heads"],
                          f"a divisor of num_attention_heads {sizes['num_attention_heads']}")  # fmt: skip
    return DecoderFields(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=sizes["vocab_size"],
        max_positions=sizes["max_position_embeddings"],
        norm_epsilon=positive_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", source, below=1.0),
        tied=boolean(config, "tie_word_embeddings", source, default=False),
        dtype=stored_dtype(config, source),
    )


def plain_rope_theta(config: Mapping[str, Any], source: str) -> float:
    """Return theta from ``rope_parameters`` (transformers 5) or ``rope_theta``.

    Raises:
        ConfigurationError: The config asks for other than plain rotary embeddings, or theta is not a positive number.
    """
    parameters: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        value = config.get(field) or {}
        if not isinstance(value, dict):
            raise unsupported(source, field, value, "an object with rope_type 'default'")
        kind = value.get("rope_type", value.get("type", "default"))
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        if kind != "default" or any(v != plain.get(k, v if k == "rope_theta" else None) for k, v in value.items()):
            raise unsupported(source, field, value, "plain rope: rope_type 'default' and no scaling")
        parameters |= value
    theta = parameters.get("rope_theta")
    theta = config.get("rope_theta") if theta is None else theta
    return positive_number(theta, "rope_theta", source)


def refuse_other_activations(config: Mapping[str, Any], source: str) -> None:
    """Check that the feed-forward layers use SiLU.

    Raises:
        ConfigurationError: They use another activation.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise unsupported(source, "hidden_act", config["hidden_act"], "'silu'")


def refuse_switches(config: Mapping[str, Any], source: str, fields: tuple[str, ...]) -> None:
    """Check that each of the boolean ``fields`` is false or absent.

    Raises:
        ConfigurationError: One of them is true.
    """
    for field in fields:
        if config.get(field) not in (None, False):
            raise unsupported(source, field, config[field], "false")


def refuse_partial_attention(config: Mapping[str, Any], source: str) -> None:
    """Check that every layer attends to all positions before it.

    Raises:
        ConfigurationError: ``layer_types`` names another kind of layer than full attention.
    """
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        shown = sorted(set(map(str, kinds))) if isinstance(kinds, list) else kinds
        raise unsupported(source, "layer_types", shown, "only 'full_attention'")


def refuse_quantised_weights(config: Mapping[str, Any], source: str) -> None:
    """Check that the weights are plain bf16 or fp32.

    Raises:
        ConfigurationError: The config describes quantised weights.
    """
    if config.get("quantization_config"):
        raise unsupported(source, "quantization_config", config["quantization_config"], "none (bf16 or fp32 weights)")


def stored_dtype(config: Mapping[str, Any], source: str) -> torch.dtype | None:
    """Return the dtype that ``dtype`` or ``torch_dtype`` names, or None if both are absent.

    Raises:
        ConfigurationError: The dtype is neither bfloat16 nor float32.
    """
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(field)
    if name is None:
        return None
    if not isinstance(name, str) or name not in _DTYPES:
        raise unsupported(source, field, name, " or ".join(repr(known) for known in _DTYPES))
    return _DTYPES[name]


def positive_int(config: Mapping[str, Any], field: str, source: str) -> int:
    """Return ``config[field]``, a positive integer.

    Raises:
        ConfigurationError: It is absent, or not an integer above 0 that fits 32 bits.
    """
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_SIZE:
        raise unsupported(source, field, value, f"a positive integer, at most {_LARGEST_SIZE:,}")
    return value


def positive_number(value: Any, field: str, source: str, *, below: float = float("inf")) -> float:
    """Return ``value``, which is the value of ``field``, as a float.

    Raises:
        ConfigurationError: It is not a finite number above 0, or not ``below`` the bound.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < below or value > sys.float_info.max:
        bound = "" if below == float("inf") else f" below {below:g}"
        raise unsupported(source, field, value, f"a positive number{bound}")
    return float(value)


def boolean(config: Mapping[str, Any], field: str, source: str, *, default: bool) -> bool:
    """Return ``config[field]``, or ``default`` if it is absent or null.

    Raises:
        ConfigurationError: It is neither true nor false. Text such as "false" would count as true.
    """
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, bool):
        raise unsupported(source, field, value, "true or false")
    return value


def unsupported(source: str, field: str, value: Any, expected: str) -> ConfigurationError:
    """Return the error that names ``source``, ``field``, its ``value`` and the ``expected`` values."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ConfigurationError(f"{source}: {field} is {shown}; expected {expected}")
