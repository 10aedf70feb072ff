"""Parallel layout: the sizes of all kinds of parallelism, and this rank's position in them.

:class:`LayoutSizes` is computed from the arguments alone, before any process group exists. :class:`Layout` has this
rank's position and the process groups, once Megatron has created them.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class LayoutSizes:
    """Number of ranks along each axis of the layout, one axis for each kind of parallelism.

    The sizes multiply to the number of processes: world = tensor x pipeline x context x data. Expert parallelism is a
    second partition of the same processes, for the expert layers only.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    @staticmethod
    def of(args: Namespace) -> LayoutSizes:
        """Read the sizes from Megatron's arguments."""
        return LayoutSizes(
            world=args.world_size,
            tensor=args.tensor_model_parallel_size,
            pipeline=args.pipeline_model_parallel_size,
            context=args.context_parallel_size,
            expert=args.expert_model_parallel_size,
        )

    @property
    def model(self) -> int:
        """Number of ranks that hold one replica of the model together."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Number of replicas of the model, which divide the global batch between them."""
        return self.world // self.model


@dataclass(frozen=True)
class Axis:
    """One axis of the layout: this rank's position on it, its size, and its process group."""

    rank: int
    size: int
    group: Any


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This rank's position on every axis, and the process groups that span several axes.

    Attributes:
        model_group: the tensor- and pipeline-parallel ranks that hold the model together; a replica has one such group
            for each of its context-parallel ranks.
        embedding_group: the pipeline stages with a copy of tied word embeddings; None on other stages.
    """

    data: Axis
    tensor: Axis
    pipeline: Axis
    context: Axis
    expert: Axis
    model_group: Any
    embedding_group: Any

    @staticmethod
    def current() -> Layout:
        """Read the layout from Megatron; its model parallelism must be initialised."""
        from megatron.core import parallel_state  # imported here: accelerator.activate() comes first

        return Layout(
            data=_axis(parallel_state.get_data_parallel_group()),
            tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
            pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
            context=_axis(parallel_state.get_context_parallel_group()),
            expert=_axis(parallel_state.get_expert_model_parallel_group()),
            model_group=parallel_state.get_model_parallel_group(),
            embedding_group=parallel_state.get_embedding_group(check_initialized=False),
        )

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage, with the embedding."""
        return self.pipeline.rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage, with the output head."""
        return self.pipeline.rank == self.pipeline.size - 1

    def stage_rank(self, stage: int) -> int:
        """Return the global rank of stage ``stage`` in this rank's pipeline; negative numbers count from the end."""
        return int(dist.get_global_rank(self.pipeline.group, stage % self.pipeline.size))

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of its replica of the model, which acts for the whole replica."""
        return self.tensor.rank == self.pipeline.rank == self.context.rank == 0


def _axis(group: Any) -> Axis:
    return Axis(dist.get_rank(group), dist.get_world_size(group), group)
