"""What a model family states about itself: the one interface between families and the rest of the package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.model_arguments import OTHER_KINDS, PLAIN_DECODER, RUN_ARGUMENTS
from megatron_camopd.families.table import Partition, TensorEntry, TensorTable

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

VLLM_FUSED = {Partition.QKV: ("q_proj", "qkv_proj"), Partition.GATE_UP: ("gate_proj", "gate_up_proj")}
"""Part of the first Hugging Face name -> part of vLLM's name, in every decoder that vLLM builds like Llama."""


class ReadArchitecture(Protocol):
    """The type of :attr:`Family.read_architecture`."""

    def __call__(self, config: Mapping[str, Any], *, source: str = "config.json") -> Architecture:
        """Read ``config`` (parsed), called ``source`` in errors.

        Raises:
            ConfigurationError: The config asks for something that the family cannot reproduce.
        """


class MegatronArguments(Protocol):
    """The type of :attr:`Family.megatron_arguments`."""

    def __call__(self, arch: Any) -> dict[str, Any]:
        """Return Megatron's arguments, by ``args`` attribute name, for a model of ``arch``."""


class LocalLayers(Protocol):
    """The type of :attr:`Family.local_layers`."""

    def __call__(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Return the specification of a pipeline stage's layers; the function itself imports Megatron."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that the package needs to know about one kind of model.

    Attributes:
        model_type: The ``model_type`` in config.json.
        title: The name in messages.
        hf_class: The class of transformers that computes the reference logits of ``--verify``.
        table: The tensors, by their names for Hugging Face and for Megatron.
        read_architecture: Reads config.json strictly.
        megatron_arguments: The arguments that the importer writes into a checkpoint.
        local_layers: The layers on machines without Transformer Engine.
        extra_state_modules: The modules of a layer that have an (empty) ``_extra_state`` beside their weights, with
            Transformer Engine's or with local layers.
        fixed_arguments: Megatron's other arguments that decide what a model computes, and their values here.
        foreign_arguments: Names of arguments that only shape models of other kinds.
        vllm_fused: For a tensor of this partition, the part of its first Hugging Face name and what stands in its
            place in the name of vLLM's parameter, into which vLLM stacks all of the tensor's parts.
    """

    model_type: str
    title: str
    hf_class: str
    table: TensorTable
    read_architecture: ReadArchitecture
    megatron_arguments: MegatronArguments
    local_layers: LocalLayers
    extra_state_modules: tuple[str, ...]
    fixed_arguments: Mapping[str, Any] = field(default_factory=lambda: PLAIN_DECODER)
    foreign_arguments: re.Pattern[str] = OTHER_KINDS
    vllm_fused: Mapping[Partition, tuple[str, str]] = field(default_factory=lambda: VLLM_FUSED)

    def stated_arguments(self, arch: Architecture) -> list[str]:
        """Names of the architecture arguments that a checkpoint of ``arch`` states; a run takes them from there."""
        return [name for name in self.megatron_arguments(arch) if name not in RUN_ARGUMENTS]

    def vllm_name(self, entry: TensorEntry, names: tuple[str, ...]) -> str:
        """The name of vLLM's parameter that holds the Hugging Face tensors ``names`` of ``entry``."""
        return names[0].replace(*self.vllm_fused.get(entry.partition, ("", "")))
