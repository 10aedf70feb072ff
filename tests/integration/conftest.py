"""A small run of four steps on two processes, once for all modules that damage, end or resume copies of it."""

import shutil
from pathlib import Path

import pytest

from megatron_camopd.checkpoint.directory import TRACKER
from tests.support.processes import run_ranks
from tests.support.small_runs import LAST, STEPS, flags, told
from tests.support.worlds import World, make_world


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def whole(small_world: World) -> Path:
    """The run of all steps."""
    save = small_world.root / "whole"
    assert run_ranks(told, 2, flags(small_world, save))[0] == (0, "", 2)
    return save


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of all but the last step of that run, as it was after them."""
    save = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(save / LAST)
    (save / TRACKER).write_text(str(STEPS - 1))
    lines = (save / "metrics.jsonl").read_text().splitlines(keepends=True)
    (save / "metrics.jsonl").write_text("".join(lines[: STEPS - 1]))
    return save
