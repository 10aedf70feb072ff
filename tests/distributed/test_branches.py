"""Three branches and two teachers on every layout: the same steps as on one process, and an exact resume.

The reference of formulas and gradients is that of the two-branch tests; here layouts and restarts must agree when a
batch holds three branches, two of which share a teacher and one prompt file.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.layouts import LAYOUTS, MODELS, SIZES, watched_step
from tests.support.processes import run_ranks
from tests.support.runs import assert_same_checkpoint, pretrain, records, without_costs
from tests.support.worlds import World, make_checkpoint

BRANCHES: list[dict[str, Any]] = [
    {"name": "math", "prompts": "common.jsonl", "teacher": "teacher", "mass_target": 0.6, "feedback_scale": 2.0},
    {"name": "code", "prompts": "common.jsonl", "teacher": "teacher", "steps": 2, "feedback_scale": 1.5},
    {"name": "style", "prompts": "style.jsonl", "teacher": "initial", "score": "positive"},
    {"name": "verse", "prompts": "style.jsonl", "teacher": "teacher", "mass_target": 0.9},
]
TABLES = {1: BRANCHES[2:3], 3: BRANCHES[:3], 4: BRANCHES}
METHODS = {"camopd": ("steps", "mass_target", "feedback_scale", "score"), "mopd": ("share",)}
STEPS = 5


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("branches"))


def make_inputs(root: Path) -> Path:
    """Two checkpoints, a common prompt file of two branches, one of the third, and a table for each kind of method."""
    for seed, name in enumerate(("student", "teacher")):
        make_checkpoint(root / name, seed=seed, **(SIZES | MODELS["untied"]))
    common = [{"prompt": "m" * (1 + row % 9) + str(row), "branch": ("math", "code")[row % 2]} for row in range(40)]
    style = [{"prompt": "s" * (1 + row % 7) + str(row), "id": f"s{row}", "category": "verse"} for row in range(20)]
    for name, prompts in (("common", common), ("style", style)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for method, fields in METHODS.items():
        other = {field for names in METHODS.values() for field in names if field not in fields}
        for count, table in TABLES.items():
            rows: list[dict[str, Any]] = [{k: v for k, v in branch.items() if k not in other} for branch in table]
            if method == "mopd" and count == 3:
                rows[1]["share"] = 2
            (root / f"{method}-{count}.json").write_text(json.dumps({"branches": rows}))
    return root


def flags(root: Path, method: str, save: Path, layout: str, *, count: int = 3, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "general_teacher_load": None, "general_prompts": None, "domain_prompts": None,
        "branches": root / f"{method}-{count}.json", "distill_method": method, "global_batch_size": 8,
        "micro_batch_size": 2, "max_response_length": 9, "lr": 1e-3, "train_iters": STEPS, "log_samples": 2,
    }  # fmt: skip
    return World(root).flags(save=save, **(settings | LAYOUTS[layout][1] | changes))


def rank_main(line: list[str]) -> list[dict[str, Any]]:
    """Every step's branches, selection, coefficients and record; the weights stay what they were."""
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    runner = DistillRunner(args, plan_distillation(args))
    assert len(runner.plan.teachers) == min(len(runner.plan.names), 2)
    steps = []
    for number in range(STEPS):
        runner.step = number
        batch, caught = watched_step(runner)
        names = [runner.plan.names[branch] for branch in batch.branches.tolist()]
        found = {name: caught[name] for name in ("selected", "coefficients", "teacher_logprobs", "student_logprobs")}
        steps.append(found | {"names": names, "ids": list(batch.prompt_ids), "record": caught["record"]})
    return steps


@functools.cache
def run_layout(parent: Path, method: str, layout: str, count: int = 3) -> list[Any]:
    line = flags(parent, method, parent / f"{method}-{layout}-{count}", layout, count=count, lr=0.0)
    return run_ranks(rank_main, LAYOUTS[layout][0], line)


@pytest.mark.parametrize("method", METHODS)
def test_batches_hold_the_branches_of_the_table(parent: Path, method: str) -> None:
    steps = run_layout(parent, method, "tp1")[0]
    turns = [["math"] * 8, ["code"] * 8, ["code"] * 8, ["style"] * 8, ["math"] * 8]
    expected = turns if method == "camopd" else [["math"] * 2 + ["code"] * 4 + ["style"] * 2] * STEPS
    assert [step["names"] for step in steps] == expected
    for step in steps:
        rows = {"math": 0, "code": 1}
        for name, identifier in zip(step["names"], step["ids"], strict=True):
            if name == "style":
                assert identifier.startswith("s")
            else:  # rows of the common file count from 1
                assert (int(identifier.removeprefix("common.jsonl:")) - 1) % 2 == rows[name]
    if method == "mopd":
        assert all(f"gap_abs_mean_{name}" in steps[0]["record"] for name in ("math", "code", "style"))
    else:
        assert [step["record"]["branch"] for step in steps] == ["math", "code", "code", "style", "math"]
        assert 0 < steps[1]["record"]["selected_fraction"] < 1
        assert steps[3]["record"]["gap_abs_mean"] == 0, "the initial student is its own teacher"


@pytest.mark.parametrize(
    ("layout", "count"),
    [*((layout, 3) for layout in ("tp2", "pp2", "dp2", "tp2-sp", "tp2-pp2")),
     *((layout, count) for layout in ("dp2", "tp2-pp2") for count in (1, 4))],
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_takes_the_same_steps(parent: Path, method: str, layout: str, count: int) -> None:
    alone = run_layout(parent, method, "tp1", count)[0]
    names = {name for step in alone for name in step["names"]}
    assert len(names) == count, "a branch was never served"
    for rank in run_layout(parent, method, layout, count):
        for found, expected in zip(rank, alone, strict=True):
            assert found["names"] == expected["names"] and found["ids"] == expected["ids"]
            assert torch.equal(found["selected"], expected["selected"])
            assert torch.equal(found["coefficients"], expected["coefficients"])
            for name in ("teacher_logprobs", "student_logprobs"):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=2e-5)
            for name in ("loss", "grad_norm", "gap_abs_mean"):
                assert found["record"][name] == pytest.approx(expected["record"][name], rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize(("method", "layout"), [("camopd", "tp2-pp2"), ("camopd", "dp2"), ("mopd", "tp1")])
def test_resume_is_exact(parent: Path, method: str, layout: str, tmp_path: Path) -> None:
    """A run that stops after 3 steps and goes on ends as the one that did not stop, samples included."""
    ranks = LAYOUTS[layout][0]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for save, changes in ((whole, {}), (resumed, {"exit_interval": 3}), (resumed, {})):
        line = flags(parent, method, save, layout, log_samples_interval=2, **changes)
        assert run_ranks(pretrain, ranks, line) == [0] * ranks
    assert list(map(without_costs, records(resumed))) == list(map(without_costs, records(whole)))
    assert_same_checkpoint(resumed / f"iter_{STEPS:07d}", whole / f"iter_{STEPS:07d}")
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
