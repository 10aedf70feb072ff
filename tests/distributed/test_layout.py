"""A rank's place on every axis of the layout, against Megatron's order: tensor, then data, then pipeline."""

from typing import Any

from tests.support.processes import run_ranks


def places(tensor: int, pipeline: int) -> dict[str, Any]:
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron.core import parallel_state

    from megatron_camopd.runtime.layout import Layout

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    layout = Layout.current()
    axes = {name: getattr(layout, name) for name in ("data", "tensor", "pipeline", "context", "expert")}
    return {
        "ranks": {name: axis.rank for name, axis in axes.items()},
        "sizes": {name: axis.size for name, axis in axes.items()},
        "stages": [layout.stage_rank(stage) for stage in (0, -1)],
        "ends": (layout.first_stage, layout.last_stage),
        "leads": layout.leads_replica,
    }


def test_ranks_of_eight_processes() -> None:
    found = run_ranks(places, 8, 2, 2)
    for rank, place in enumerate(found):
        tensor, data, stage = rank % 2, rank // 2 % 2, rank // 4
        assert place["ranks"] == {"data": data, "tensor": tensor, "pipeline": stage, "context": 0, "expert": 0}
        assert place["sizes"] == {"data": 2, "tensor": 2, "pipeline": 2, "context": 1, "expert": 1}
        assert place["stages"] == [rank % 4, rank % 4 + 4] and place["ends"] == (stage == 0, stage == 1)
        assert place["leads"] == (tensor == stage == 0)


def test_ranks_of_two_replicas() -> None:
    for rank, place in enumerate(run_ranks(places, 2, 1, 1)):
        assert place["ranks"]["data"] == rank and place["leads"] and place["ends"] == (True, True)
