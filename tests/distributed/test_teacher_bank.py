"""The bank of teachers: whichever is asked for, in whatever order, the resident model holds exactly its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.worlds import make_world


def rank_main(line: list[str]) -> dict[str, Any]:
    from megatron_camopd.checkpoint.training_state import load_weights
    from megatron_camopd.model.builder import build_model
    from megatron_camopd.runtime.startup import initialize_megatron
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.teachers.bank import TeacherBank

    args = parse_arguments(line)
    plan = plan_distillation(args)
    initialize_megatron(args)
    places = [teacher.location for teacher in plan.teachers]
    expected = []
    for location in places:
        model = build_model(args, trainable=False)
        load_weights(args, model, location)
        expected.append(torch.cat([parameter.flatten() for chunk in model for parameter in chunk.parameters()]))
    bank = TeacherBank(args, places)
    order = [0, 0, 1, 0, 1]
    exact, frozen = [], True
    for teacher, following in zip(order, order[1:] + order[:1], strict=True):
        chunks = bank.activate(teacher)
        weights = torch.cat([parameter.flatten() for chunk in chunks for parameter in chunk.parameters()])
        exact.append(torch.equal(weights, expected[teacher]))
        frozen &= not any(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())
        bank.prefetch(following)
    differ = not torch.equal(expected[0], expected[1])
    orders = [bank.in_order([0, 1, 1, 0]), bank.in_order([1])]
    return {"exact": exact, "frozen": frozen, "differ": differ, "orders": orders}


@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_the_resident_teacher_is_the_one_asked_for(tmp_path: Path, layout: str) -> None:
    world = make_world(tmp_path)
    for result in run_ranks(rank_main, 2, [*world.flags(save=tmp_path / "run"), layout, "2"]):
        assert result == {"exact": [True] * 5, "frozen": True, "differ": True, "orders": [[0, 1], [1]]}
