"""Registry of the model families by the ``model_type`` of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_camopd.families import qwen3, qwen3_moe
from megatron_camopd.families.config_fields import unsupported
from megatron_camopd.families.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (qwen3.FAMILY, qwen3_moe.FAMILY)}


def family_of(config: Mapping[str, Any], *, source: str = "config.json") -> Family:
    """Return the family of the model that ``config`` (the parsed config.json) describes.

    Raises:
        ConfigurationError: No family has this ``model_type``; the error names the known ones.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = " or ".join(f"{known.model_type!r} ({known.title})" for known in FAMILIES.values())
        raise unsupported(source, "model_type", model_type, known)
    return family
