"""Interface that every model family implements: names, sizes, tensors and layers of one kind of model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.model_arguments import OTHER_KINDS, PLAIN_DECODER, RUN_ARGUMENTS
from megatron_camopd.families.placement import ModuleState
from megatron_camopd.families.table import Partition, TensorEntry, TensorTable

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

VLLM_FUSED = {Partition.QKV: ("q_proj", "qkv_proj"), Partition.GATE_UP: ("gate_proj", "gate_up_proj")}
"""Default of :attr:`Family.vllm_fused`, for every decoder that vLLM builds like Llama."""


class ReadArchitecture(Protocol):
    """Type of :attr:`Family.read_architecture`."""

    def __call__(self, config: Mapping[str, Any], *, source: str = "config.json") -> Architecture:
        """Read ``config``, the parsed config.json, which errors call ``source``.

        Raises:
            ConfigurationError: The config asks for something that the family cannot reproduce.
        """


class MegatronArguments(Protocol):
    """Type of :attr:`Family.megatron_arguments`."""

    def __call__(self, arch: Any) -> dict[str, Any]:
        """Return Megatron's arguments, by ``args`` attribute name, for a model of ``arch``."""


class LocalLayers(Protocol):
    """Type of :attr:`Family.local_layers`."""

    def __call__(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Return the specification of a pipeline stage's layers, importing Megatron only when called."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that the package needs to know about one kind of model.

    Attributes:
        model_type: The ``model_type`` in config.json.
        title: The family's name in messages.
        hf_class: The transformers class that computes the reference logits of ``--verify``.
        table: The tensors, by their names in Hugging Face's models and in Megatron.
        read_architecture: Reads config.json strictly.
        megatron_arguments: Returns the arguments that the importer writes into a checkpoint.
        local_layers: Returns the layers for machines without Transformer Engine.
        extra_state_modules: The modules of every layer that have an (empty) ``_extra_state`` beside their weights, with
            Transformer Engine's layers or with local ones.
        partial_state_modules: The same of modules that some layers have, or every expert.
        fixed_arguments: Megatron's other arguments that decide what a model computes, with this family's values.
        foreign_arguments: Pattern of the names of arguments that matter only in models of other kinds.
        vllm_fused: How vLLM names the parameter into which it stacks all Hugging Face parts of a tensor: for a
            tensor's partition, (a part of its first Hugging Face name, its replacement in vLLM's name).
    """

    model_type: str
    title: str
    hf_class: str
    table: TensorTable
    read_architecture: ReadArchitecture
    megatron_arguments: MegatronArguments
    local_layers: LocalLayers
    extra_state_modules: tuple[str, ...]
    partial_state_modules: tuple[ModuleState, ...] = ()
    fixed_arguments: Mapping[str, Any] = field(default_factory=lambda: PLAIN_DECODER)
    foreign_arguments: re.Pattern[str] = OTHER_KINDS
    vllm_fused: Mapping[Partition, tuple[str, str]] = field(default_factory=lambda: VLLM_FUSED)

    def stated_arguments(self, arch: Architecture) -> list[str]:
        """Return the names of the arguments that a run takes from a checkpoint of ``arch``."""
        return [name for name in self.megatron_arguments(arch) if name not in RUN_ARGUMENTS]

    def extra_states(self, arch: Architecture) -> Iterator[str]:
        """Iterate over the names in a checkpoint of ``arch`` of all ``_extra_state`` in layers."""
        modules = (*(ModuleState(module=name) for name in self.extra_state_modules), *self.partial_state_modules)
        for module in modules:
            yield from module.names(arch)

    def vllm_name(self, entry: TensorEntry, names: tuple[str, ...]) -> str:
        """Return the name of vLLM's parameter that holds the Hugging Face tensors ``names`` of ``entry``."""
        return names[0].replace(*self.vllm_fused.get(entry.partition, ("", "")))
