"""Sizes of a layout from the arguments; ranks and groups are tested with real processes in tests/distributed."""

from argparse import Namespace

import pytest

from megatron_camopd.runtime.layout import LayoutSizes


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "context", "model", "data"),
    [(1, 1, 1, 1, 1, 1), (8, 2, 2, 1, 4, 2), (16, 2, 2, 2, 8, 2), (32, 4, 1, 8, 32, 1), (6, 1, 3, 1, 3, 2)],
)
def test_sizes(world: int, tensor: int, pipeline: int, context: int, model: int, data: int) -> None:
    args = Namespace(
        world_size=world, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        context_parallel_size=context, expert_model_parallel_size=1,
    )  # fmt: skip
    sizes = LayoutSizes.of(args)
    assert (sizes.model, sizes.data) == (model, data) and sizes.model * sizes.data == world
