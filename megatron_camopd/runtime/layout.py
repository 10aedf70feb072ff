"""The parallel layout: by how many ranks model and data are shared, and where this rank stands among them.

:class:`LayoutSizes` follows from the arguments alone, before any process group exists; :class:`Layout` is this rank's
place once Megatron has made its groups. Everything that asks for a rank, a size or a group asks here.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class LayoutSizes:
    """Number of ranks along each axis of a run.

    The axes multiply to the number of processes: world = tensor x pipeline x context x data. Expert parallelism deals
    out the same processes a second time, within the layers of experts only.
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
        """Ranks that hold one replica of the model together."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Replicas of the model, each of which gets its own share of a batch."""
        return self.world // self.model


@dataclass(frozen=True)
class Axis:
    """One axis of the layout, as this rank sees it: its place, the number of places, and their process group."""

    rank: int
    size: int
    group: Any


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This rank's place on every axis, and the groups that span several axes.

    ``model_group``: the ranks of this rank's replica of the model; ``embedding_group``: the pipeline stages that hold
    a copy of tied word embeddings, or None on the others.
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
        """Read the layout from Megatron, whose model parallelism must be initialised."""
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
        """Return the rank in the world of this rank's pipeline ``stage``; negative numbers count from the last."""
        return dist.get_global_rank(self.pipeline.group, stage % self.pipeline.size)

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of its replica of the model, which speaks for the others."""
        return self.tensor.rank == self.pipeline.rank == self.context.rank == 0


def _axis(group: Any) -> Axis:
    return Axis(dist.get_rank(group), dist.get_world_size(group), group)
