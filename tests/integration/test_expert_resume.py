"""Fine-tuning of a model with experts that stops and goes on: bit for bit, or spread over the processes otherwise."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.expert_runs import EP2, LAYOUTS, SHARDED, world
from tests.support.processes import run_ranks
from tests.support.runs import assert_same_checkpoint, pretrain, records, without_costs
from tests.support.worlds import refusal

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, SHARDED),
    "dp2": (2, SHARDED),
    "ep2": (2, EP2 | SHARDED),
    "ep4": (4, SHARDED | {"expert_model_parallel_size": 4}),
    "tp2 dp2 ep2": LAYOUTS["tp2 dp2 ep2"],
    "pp2 ep2": (4, LAYOUTS["pp2 ep2"][1] | SHARDED),
    "ep2, whole optimizer": (2, EP2),
}
HALF, ALL = 2, 4


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expert-resume")


def flags(parent: Path, save: Path, name: str, steps: int) -> list[str]:
    found = world(parent)
    return found.flags(
        stage="sft", save=save, general_teacher_load=None, general_prompts=None, domain_prompts=None,
        max_prompt_length=None, max_response_length=None, seq_length=120, global_batch_size=4,
        conversations=found.root / "rows.jsonl", lr=1e-3, train_iters=steps, **RUNS[name][1],
    )  # fmt: skip


@functools.cache
def run(parent: Path, name: str, steps: int, start: str | None = None) -> Path:
    """The folder of a run of ``steps`` steps; with ``start`` its first half ran in that layout."""
    save = parent / f"{name}-{steps}-{start}".replace(" ", "-")
    if start is not None:
        shutil.copytree(run(parent, start, HALF), save)
    assert run_ranks(pretrain, RUNS[name][0], flags(parent, save, name, steps)) == [0] * RUNS[name][0]
    return save


@pytest.mark.parametrize("name", ["ep2", "tp2 dp2 ep2", "ep2, whole optimizer"])
def test_the_same_layout_goes_on_bit_for_bit(parent: Path, name: str) -> None:
    whole, resumed = run(parent, name, ALL), run(parent, name, ALL, start=name)
    assert list(map(without_costs, records(resumed))) == list(map(without_costs, records(whole)))
    assert_same_checkpoint(resumed / f"iter_{ALL:07d}", whole / f"iter_{ALL:07d}")


@pytest.mark.parametrize(
    ("start", "name"),
    [("ep2", "one"), ("ep2", "dp2"), ("ep2", "ep4"), ("ep2", "tp2 dp2 ep2"), ("ep2", "pp2 ep2"), ("dp2", "ep2"),
     ("dp2", "tp2 dp2 ep2")],
)  # fmt: skip
def test_another_expert_parallel_size_goes_on(parent: Path, start: str, name: str) -> None:
    """Adam's moments come along: without them the third step would be like a first one."""
    found, expected = records(run(parent, name, ALL, start=start)), records(run(parent, "one", ALL))
    assert [record["step"] for record in found] == list(range(ALL))
    for record, wanted in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def test_a_whole_optimizer_stays_where_it_is(parent: Path) -> None:
    save = run(parent, "ep2, whole optimizer", HALF)
    line = flags(parent, save, "dp2", ALL)
    line.remove("--use-distributed-optimizer")
    assert refusal([*line, "--dry-run", "2"]) == (
        f"--expert-model-parallel-size 1: the run in --save {save} was saved with 2; only --use-distributed-optimizer "
        "lets a run go on with another"
    )
