"""``--distill-method`` and the flags of each method: what goes together, what is refused, what a resumed run keeps."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.objective.camopd import CaMOPD
from megatron_camopd.objective.mopd import VanillaMOPD
from megatron_camopd.objective.relaxed_opd import RelaxedOPD
from megatron_camopd.objective.selectkd import GreedySelecTKD, SpeculativeSelecTKD
from megatron_camopd.schedule import MixedSchedule, ScoreRule
from tests.support.method_flags import METHOD_FLAGS, VALUES
from tests.support.saved_runs import save_run
from tests.support.worlds import World, prepare, refusal


def test_every_flag_of_a_method_is_tried() -> None:
    assert VALUES.keys() == {name for names in METHOD_FLAGS.values() for name in names}


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_flags_of_other_methods_are_refused(method: str, world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    own = {name: VALUES[name] for name in METHOD_FLAGS[method]}
    assert prepare(world.flags(save=save, distill_method=method, **own))
    for name in VALUES.keys() - own.keys():
        line = refusal(world.flags(save=save, distill_method=method, **{name: VALUES[name]}))
        flag = f"--{name.replace('_', '-')}"
        assert line == f"{flag}: has no effect with --distill-method {method}; drop one of the two"
    assert not save.exists()


def test_what_the_flags_build(world: World, tmp_path: Path) -> None:
    def build(**changes: Any) -> Any:
        return prepare(world.flags(save=tmp_path / "run", train_iters=9, **changes))[1]

    plan = build()
    assert plan.method == CaMOPD(plan.table.branches)
    rules = [(one.score, one.mass_target, one.feedback_scale) for one in plan.table.branches]
    assert rules == [(ScoreRule.ABSOLUTE, 0.8, 2.0), (ScoreRule.POSITIVE, 0.8, 1.0)]
    assert build(unselected_samples="keep").method.keep_unselected
    mixed = build(distill_method="mopd")
    assert mixed.method == VanillaMOPD() and isinstance(mixed.table.schedule, MixedSchedule)
    assert mixed.table.schedule.counts(5, 4) == (2, 2)
    assert build(distill_method="mopd", mixing_ratio="3:1").table.schedule.counts(0, 4) == (3, 1)
    relaxed = build(distill_method="relaxed-opd").method
    assert isinstance(relaxed, RelaxedOPD) and relaxed.switch_step == 4 and relaxed.entropy_fraction == 0.2
    assert relaxed.floor == pytest.approx(-2.5584279)
    assert build(distill_method="relaxed-opd", relaxed_opd_floor="logit").method.floor == pytest.approx(-2.1972246)
    assert build(distill_method="selectkd").method == GreedySelecTKD(5, 0.01)
    speculative = build(distill_method="selectkd", selectkd_verification="speculative", seed=3)
    assert speculative.method == SpeculativeSelecTKD(5, 0.01, seed=3)


def test_one_sided_mixtures_need_one_teacher(world: World, tmp_path: Path) -> None:
    general = {"mixing_ratio": "1:0", "domain_prompts": None}
    _, plan = prepare(world.flags(save=tmp_path / "run", distill_method="mopd", **general))
    assert list(plan.teacher_of) == list(plan.streams) == [0]
    assert plan.table.schedule.counts(0, 4) == (4, 0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distill_method": "dpo"}, "argument --distill-method: invalid choice: 'dpo'"),
        (
            {"distill_method": "mopd", "mixing_ratio": "3"},
            "argument --mixing-ratio: '3' is not two whole numbers G:D, such as 3:1",
        ),
        ({"distill_method": "mopd", "mixing_ratio": "-1:2"}, "argument --mixing-ratio: "),
        ({"distill_method": "mopd", "mixing_ratio": "0:0"}, "--mixing-ratio 0:0: must be whole numbers of 0 or more"),
        (
            {"distill_method": "mopd", "mixing_ratio": "2:1"},
            "--global-batch-size 4: does not divide as --mixing-ratio 2:1",
        ),
        ({"distill_method": "relaxed-opd", "relaxed_opd_lambda": 1.0}, "--relaxed-opd-lambda 1.0: must be above 0"),
        (
            {"distill_method": "relaxed-opd", "relaxed_opd_floor": "logit", "relaxed_opd_lambda": 0.5},
            "--relaxed-opd-lambda 0.5: must be above 0 and below 0.5 with --relaxed-opd-floor logit",
        ),
        (
            {"distill_method": "relaxed-opd", "relaxed_opd_entropy_fraction": 0.0},
            "--relaxed-opd-entropy-fraction 0.0: must be in (0, 1]",
        ),
        ({"distill_method": "relaxed-opd", "relaxed_opd_switch_step": -1}, "--relaxed-opd-switch-step -1: must be at"),
        ({"distill_method": "selectkd", "selectkd_candidates": 0}, "--selectkd-candidates 0: must be at least 1"),
        ({"distill_method": "selectkd", "selectkd_candidates": 260}, "--selectkd-candidates 260: "),
        ({"distill_method": "selectkd", "selectkd_rejected_weight": 1.5}, "--selectkd-rejected-weight 1.5: must be in"),
        ({"gradient_diagnostics_interval": -1}, "--gradient-diagnostics-interval -1: must be 0 (off) or more"),
        ({"gradient_diagnostics_samples": 2}, "--gradient-diagnostics-samples: has no effect without --gradient"),
        (
            {"gradient_diagnostics_interval": 1, "gradient_diagnostics_samples": 5},
            "--gradient-diagnostics-samples 5: must be a multiple of the data-parallel size 1, from 1 to",
        ),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], line: str, world: World, tmp_path: Path) -> None:
    assert refusal(world.flags(save=tmp_path / "run", **changes)).startswith(line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method, names in METHOD_FLAGS.items() for name in names if method not in ("camopd", "mopd")],
)
def test_resumed_run_keeps_its_method(
    method: str, name: str, world: World, saved_runs: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(saved_runs[method], tmp_path / "run"))
    assert prepare(world.flags(save=run, distill_method=method, train_iters=9))[0].resume
    line = refusal(world.flags(save=run, distill_method=method, train_iters=9, **{name: VALUES[name]}))
    assert line.startswith(f"--{name.replace('_', '-')} is ") and "the checkpoint in --save" in line


@pytest.fixture(scope="module")
def saved_runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``--save`` folders of runs of 9 steps that have done some."""
    root = tmp_path_factory.mktemp("methods")
    return {
        method: save_run(world, root / method, distill_method=method, train_iters=9)
        for method in ("relaxed-opd", "selectkd")
    }
