"""Steps whose loss is not finite: nothing changes, the record counts them, and too many in a row end the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_camopd.checkpoint.import_hf import import_hf
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_world

BROKEN_STEPS = (1, 2)
RANKS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("skipped"))


def flags(world: World, name: str, **changes: Any) -> list[str]:
    settings = {"train_iters": 6, "max_response_length": 6, "lr": 1e-3, "recovery_steps": 5}
    return world.flags(save=world.root / name, **(settings | changes))


def train_with_broken_scores(line: list[str], damage: str) -> dict[str, Any]:
    """Four steps; in BROKEN_STEPS one value of the first sample's scores is replaced. Weights and states after each."""
    import dataclasses

    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    score = trainer.score

    def broken_score(*arguments: Any) -> Any:
        batch = score(*arguments)
        if trainer.step in BROKEN_STEPS:
            values = batch.teacher_logprobs.clone()
            values[0, 0] = float(damage)
            batch = dataclasses.replace(batch, teacher_logprobs=values)
        return batch

    setattr(trainer, "score", broken_score)  # noqa: B010 - assigning to a method
    snapshots, records, diverged = [], [], []
    for _ in range(4):
        records.append(trainer.train_step())
        trainer.step += 1
        diverged.append(trainer.diverged)
        weights = {name: value.detach().clone() for name, value in trainer.model[0].named_parameters()}
        moments = [
            {name: torch.as_tensor(value).clone() for name, value in state.items()}
            for state in trainer.optimizer.optimizer.state.values()
        ]
        snapshots.append({"weights": weights, "moments": moments, "samples": trainer.scheduler.num_steps})
    return {"snapshots": snapshots, "records": records, "diverged": diverged}


def test_nothing_changes_in_a_skipped_step(world: World) -> None:
    for damage, layout in (("nan", {"tensor_model_parallel_size": 2}), ("-inf", {})):
        for rank in run_ranks(train_with_broken_scores, RANKS, flags(world, f"broken{damage}", **layout), damage):
            first, second, third, fourth = rank["snapshots"]
            for skipped in (second, third):
                assert skipped["samples"] == first["samples"]
                assert all(torch.equal(skipped["weights"][name], value) for name, value in first["weights"].items())
                assert len(first["moments"]) == len(skipped["moments"]) == len(first["weights"])
                for state, expected in zip(skipped["moments"], first["moments"], strict=True):
                    assert state.keys() == expected.keys() >= {"step", "exp_avg", "exp_avg_sq"}
                    assert all(torch.equal(state[name], value) for name, value in expected.items())
            assert any(not torch.equal(fourth["weights"][name], value) for name, value in first["weights"].items())
            assert all(value.isfinite().all() for value in fourth["weights"].values())
            assert [record["skipped"] for record in rank["records"]] == [0, 1, 1, 0]
            assert rank["diverged"] == [False, True, True, False]


def pretrain(line: list[str]) -> int:
    import sys

    import pretrain_camopd

    sys.argv = ["pretrain_camopd.py", *line]
    return pretrain_camopd.main()


def pretrain_with_errors(line: list[str]) -> tuple[int, str]:
    """Train, and return the exit status and what was written to stderr."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = pretrain(line)
    return status, told.getvalue()


@pytest.fixture(scope="module")
def broken_teacher(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose weights are finite and whose scores are not: its logits overflow."""
    tmp_path = tmp_path_factory.mktemp("broken")
    source = world.root / "teacher-hf" / "model.safetensors"
    tensors = load_file(source)
    tensors["model.norm.weight"].fill_(3e38)
    broken_hf = tmp_path / "broken-hf"
    broken_hf.mkdir()
    for path in source.parent.iterdir():
        if path != source:
            (broken_hf / path.name).write_bytes(path.read_bytes())
    save_file(tensors, broken_hf / source.name, metadata={"format": "pt"})
    return Path(import_hf(broken_hf, tmp_path / "broken"))


def test_a_branch_that_never_succeeds_ends_the_run(world: World, broken_teacher: Path) -> None:
    """Good domain steps between them do not reset the count of the general steps, also across a resume."""
    changes = {"general_teacher_load": broken_teacher, "recovery_steps": 1, "train_iters": 9, "max_skipped_steps": 3}
    line = flags(world, "branch", **changes)
    assert run_ranks(pretrain, 1, [*line, "--exit-interval", "2", "--save-interval", "1"]) == [0]
    moved = Path(shutil.copytree(broken_teacher, world.root / "moved"))  # the count knows the branch, not the folder
    line = flags(world, "branch", **(changes | {"general_teacher_load": moved}))
    ((status, told),) = run_ranks(pretrain_with_errors, 1, line)
    records = [json.loads(line) for line in (world.root / "branch" / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == [1, 0, 1, 0, 1]
    assert status == 3 and "not finite in 3 steps in a row of branch general (teacher " in told and str(moved) in told


def test_a_mixed_step_names_the_broken_branch(world: World, broken_teacher: Path) -> None:
    changes = {"general_teacher_load": broken_teacher, "distill_method": "mopd", "recovery_steps": None}
    line = flags(world, "mixed", **changes, max_skipped_steps=2)
    ((status, told),) = run_ranks(pretrain_with_errors, 1, line)
    assert status == 3 and "not finite in 2 steps in a row of branch general (teacher " in told
    assert str(broken_teacher) in told and "branch domain" not in told


def test_too_many_in_a_row_end_the_run(world: World, broken_teacher: Path) -> None:
    """The general teacher is broken: status 3 on every rank, after the steps that --max-skipped-steps allows."""
    line = flags(world, "ends", general_teacher_load=broken_teacher, max_skipped_steps=3,
                 pipeline_model_parallel_size=2)  # fmt: skip
    assert run_ranks(pretrain, RANKS, line) == [3, 3]
    lines = (world.root / "ends" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [1, 1, 1]
    assert not list((world.root / "ends").glob("iter_*"))
