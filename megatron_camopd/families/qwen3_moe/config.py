"""Architecture of a Qwen3 with experts from its config.json.

The reader is strict, as that of dense Qwen3. On top of what that refuses, it refuses shared experts, other routers
than softmax over all experts, and a choice of experts by groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_camopd.families import config_fields, qwen3
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.config_fields import unsupported

_EXPERT_FIELDS = ("num_experts", "num_local_experts")  # as published, and as transformers 5 writes it
# Fields of other mixtures of experts, and the values with which they change nothing.
_ABSENT: dict[str, tuple[Any, str]] = {
    "shared_expert_intermediate_size": ((None, 0), "none: shared experts are not supported"),
    "n_shared_experts": ((None, 0), "none: shared experts are not supported"),
    "num_shared_experts": ((None, 0), "none: shared experts are not supported"),
    "scoring_func": ((None, "softmax"), "'softmax'"),
    "routed_scaling_factor": ((None, 1), "none: expert outputs are not scaled"),
    "n_group": ((None, 1), "none: experts are not chosen by groups"),
    "topk_group": ((None, 1), "none: experts are not chosen by groups"),
    "router_jitter_noise": ((None, 0), "none"),
    "mlp_bias": ((None, False), "false"),
}


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeArchitecture(Architecture):
    """Sizes of a Qwen3 with experts.

    ``ffn_hidden_size`` is the width of dense layers, ``expert_ffn_hidden_size`` that of one expert.
    ``normalize_top_probabilities``: the probabilities of a token's experts are scaled to add up to 1.
    ``dense_layer_numbers`` are the layers without experts, in ascending order.
    """

    expert_ffn_hidden_size: int
    normalize_top_probabilities: bool
    dense_layer_numbers: tuple[int, ...] = ()

    @property
    def layers_differ(self) -> bool:
        """Whether there are dense layers beside those with experts."""
        return bool(self.dense_layer_numbers)


def dense_layers(arch: Architecture) -> tuple[int, ...]:
    """Return the numbers of the layers of ``arch`` that have no experts."""
    assert isinstance(arch, Qwen3MoeArchitecture)
    return arch.dense_layer_numbers


def expert_layers(arch: Architecture) -> tuple[int, ...]:
    """Return the numbers of the layers of ``arch`` that have experts."""
    dense = set(dense_layers(arch))
    return tuple(layer for layer in range(arch.num_layers) if layer not in dense)


def read_architecture(config: Mapping[str, Any], *, source: str = "config.json") -> Qwen3MoeArchitecture:
    """Read the architecture of a Qwen3 with experts from ``config`` (the parsed config.json).

    Raises:
        ConfigurationError: The config asks for something that is not supported, or a size is absent or impossible; the
            error names ``source``, the field, its value and what is expected.
    """
    dense = qwen3.FAMILY.read_architecture(config, source=source)
    for field, (harmless, expected) in _ABSENT.items():
        if config.get(field) not in harmless:
            raise unsupported(source, field, config[field], expected)
    experts = _number_of_experts(config, source)
    normalize = config_fields.boolean(config, "norm_topk_prob", source, default=False)
    return Qwen3MoeArchitecture(
        **vars(dense) | {"num_experts": experts, "experts_per_token": _experts_per_token(config, source, experts)},
        expert_ffn_hidden_size=config_fields.positive_int(config, "moe_intermediate_size", source),
        normalize_top_probabilities=normalize,
        dense_layer_numbers=_dense_layers(config, source, dense.num_layers),
    )


def _number_of_experts(config: Mapping[str, Any], source: str) -> int:
    """Read the number of experts of a layer, which has two names."""
    given = [field for field in _EXPERT_FIELDS if config.get(field) is not None] or list(_EXPERT_FIELDS[:1])
    sizes = [config_fields.positive_int(config, field, source) for field in given]
    if len(set(sizes)) > 1:
        raise unsupported(source, given[1], sizes[1], f"{sizes[0]}, as {given[0]} says")
    return sizes[0]


def _experts_per_token(config: Mapping[str, Any], source: str, experts: int) -> int:
    """Read how many experts a token uses."""
    field = "num_experts_per_tok"
    chosen = config_fields.positive_int(config, field, source)
    if chosen > experts:
        raise unsupported(source, field, chosen, f"at most the number of experts, {experts}")
    if chosen == 1 and config.get("norm_topk_prob"):
        raise unsupported(source, field, chosen, "at least 2 with norm_topk_prob: a single one has probability 1")
    return chosen


def _dense_layers(config: Mapping[str, Any], source: str, layers: int) -> tuple[int, ...]:
    """Read which of the ``layers`` have no experts: those of ``mlp_only_layers``, and all but every s-th."""
    listed = config.get("mlp_only_layers")
    listed = [] if listed is None else listed
    valid = isinstance(listed, list) and all(type(number) is int and 0 <= number < layers for number in listed)
    if not valid:
        raise unsupported(source, "mlp_only_layers", listed, f"a list of layer numbers below {layers}")
    step = 1
    if config.get("decoder_sparse_step") is not None:
        step = config_fields.positive_int(config, "decoder_sparse_step", source)
    dense = tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)
    if len(dense) == layers:
        field = "mlp_only_layers" if step <= layers else "decoder_sparse_step"
        raise unsupported(source, field, config[field], "at least one layer with experts")
    return dense
