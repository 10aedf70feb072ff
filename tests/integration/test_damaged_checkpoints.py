"""Damaged and poisoned checkpoints: passed over, refused or not written at all, and never used in silence.

What has to be found before processes meet is found by dry runs in this process; the rest runs the real entry point.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.checksums import SUMS, read_checksums
from megatron_camopd.errors import ConfigurationError
from tests.support.damage import DAMAGE, flip_bit, poison
from tests.support.processes import run_ranks
from tests.support.runs import assert_same_checkpoint
from tests.support.small_runs import LAST, STEPS, assert_as_uninterrupted, dry_run, flags, refused, snapshot, told
from tests.support.worlds import World


@pytest.fixture(scope="module")
def world(small_world: World) -> World:
    return small_world


FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json", SUMS]


def test_every_file_of_a_checkpoint_is_hashed(whole: Path) -> None:
    for folder in sorted(whole.glob("iter_*")):
        digests = read_checksums(folder)
        assert digests is not None and sorted([*digests, SUMS]) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_newest_is_passed_over(
    damage: Callable[[Path], None], name: str, world: World, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage is DAMAGE["missing"] and name in (SUMS, ".metadata", "metadata.json"):
        name = "__0_0.distcp"  # without one of the others it counts as unverified or incomplete: tested below
    damage(run / "iter_0000003" / name)
    before = snapshot(run)
    found = dry_run(flags(world, run), capsys)
    assert f"WARNING: --save {run}: damaged (" in found and "going on from iter_0000002" in found
    assert "iter_0000003" in found.split("going on")[0] and name in found.split("going on")[0]
    assert snapshot(run) == before


def test_two_damaged_ones_are_passed_over(world: World, run: Path, whole: Path) -> None:
    """On two processes: one damage shows when the index is read, the other by the checksums alone."""
    (run / "iter_0000003" / ".metadata").write_bytes(b"\x80")
    flip_bit(run / "iter_0000002" / "__1_0.distcp", at=0.9)
    for status, error, _ in run_ranks(told, 2, flags(world, run)):
        assert (status, error) == (0, "")
    assert_as_uninterrupted(run, whole)
    for step in range(1, STEPS + 1):
        assert_same_checkpoint(run / f"iter_{step:07d}", whole / f"iter_{step:07d}")  # written anew


def test_with_none_left_the_run_ends(world: World, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, STEPS):
        flip_bit(run / f"iter_{step:07d}" / "__0_0.distcp")
    before = snapshot(run)
    line = refused(flags(world, run), capsys)
    assert line.startswith(f"--save {run}: none of its 3 checkpoints can be read (")
    for status, error, _ in run_ranks(told, 2, flags(world, run)):
        assert status == 2 and f"--save {run}: none of its 3 checkpoints can be read (" in error
    assert snapshot(run) == before
    shutil.rmtree(run / "iter_0000001")
    shutil.rmtree(run / "iter_0000002")
    assert refused(flags(world, run), capsys).startswith(f"--save {run}: its checkpoint cannot be read (")


def test_unverified_ones_are_said(world: World, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "iter_0000003" / SUMS).unlink()
    assert f"--save {run}: iter_0000003 has no {SUMS}" in dry_run(flags(world, run), capsys)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_students_and_teachers_are_refused(
    damage: Callable[[Path], None], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path(shutil.copytree(world.teacher, tmp_path / "bad"))
    damage(bad / "release" / "__0_0.distcp")
    for name in ("load", "general_teacher_load", "domain_teacher_load"):
        line = refused(flags(world, tmp_path / "run", **{name: bad}), capsys)
        assert line.startswith(f"--{name.replace('_', '-')} {bad}: ") and "__0_0.distcp" in line
    line = refused(generate(world, tmp_path, bad), capsys)
    assert line.startswith(f"--load {bad}: ") and "__0_0.distcp" in line
    assert not (tmp_path / "run").exists()


def generate(world: World, folder: Path, model: Path) -> list[str]:
    return [
        "--stage", "generate", "--load", str(model), "--prompts", str(world.general),
        "--responses", str(folder / "out.jsonl"), "--max-prompt-length", "40", "--max-response-length", "8",
        "--global-batch-size", "4",
    ]  # fmt: skip


def test_a_teacher_that_changed_is_not_the_same(world: World, run: Path, tmp_path: Path) -> None:
    """The fingerprint covers every byte: one weight in the middle of a file, with right checksums."""
    other = Path(shutil.copytree(world.teacher, tmp_path / "other"))
    poison(other / "release", "decoder.layers.mlp.linear_fc2.weight", 0.125)
    for status, error, _ in run_ranks(told, 1, flags(world, run, general_teacher_load=other)):
        assert status == 2 and "is not the checkpoint that the run in --save" in error


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["load", "general_teacher_load"])
def test_weights_must_be_finite(name: str, value: float, world: World, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(world.teacher, tmp_path / "bad"))
    poison(bad / "release", "decoder.final_layernorm.weight", value)
    for status, error, _ in run_ranks(told, 2, flags(world, tmp_path / "run", **{name: bad})):
        assert status == 2 and f"{bad / 'release'}: weight " in error
        assert "final_layernorm.weight holds NaN or infinity" in error
    assert not (tmp_path / "run").exists()


def spoil_weights(line: list[str], after: int) -> tuple[int, str]:
    """Train; the optimizer step number ``after`` leaves a weight that is not finite, on rank 0 alone."""
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    import torch.distributed as dist

    from megatron_camopd.stages.distill.runner import DistillRunner

    train_step = DistillRunner.train_step

    def spoiled(self: DistillRunner) -> dict[str, Any]:
        record = train_step(self)
        if self.step + 1 == after and dist.get_rank() == 0:
            next(self.model[0].parameters()).data.view(-1)[7] = float("inf")
        return record

    setattr(DistillRunner, "train_step", spoiled)  # noqa: B010 - assigning to a method
    status, error, _ = told(line)
    return status, error


@pytest.mark.parametrize("after", [1, 2, 3])
def test_poisoned_weights_are_not_saved(after: int, world: World, tmp_path: Path) -> None:
    """Whether the step that made them ends in a checkpoint (interval 2) or later ones are skipped before it."""
    save = tmp_path / "run"
    line = flags(world, save, train_iters=8, save_interval=2, pipeline_model_parallel_size=2)
    last = 2 if after == 3 else 0
    for status, error in run_ranks(spoil_weights, 2, line, after):
        assert status == 3 and "is not finite after" in error
        assert (f"the last checkpoint in {save} is of step {last}" if last else "holds no checkpoint yet") in error
    assert sorted(path.name for path in save.glob("iter_*")) == [f"iter_{last:07d}"] * bool(last)


@pytest.mark.parametrize("where", ["load", "general_teacher_load", "save"])
def test_a_config_of_another_model_is_named(
    where: str, world: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json says another rotary base than that with which the checkpoint was made: exports would be wrong."""
    folder = run if where == "save" else Path(shutil.copytree(world.teacher, tmp_path / "other"))
    path = folder / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    path.write_text(json.dumps(config))
    changes = {} if where == "save" else {where: folder}
    line = refused(flags(world, run if where == "save" else tmp_path / "new", **changes), capsys)
    assert line.startswith(f"{path}: rotary-base is 5000") and "were made with 10000" in line
    from megatron_camopd.checkpoint.export_hf import export_hf

    with pytest.raises(ConfigurationError, match="rotary-base is 5000"):
        export_hf(folder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_folder_of_these_steps_is_written_anew(world: World, run: Path, whole: Path) -> None:
    """Also with files of more processes than the run has now, which nobody would hash."""
    folder = Path(shutil.copytree(run / "iter_0000003", run / LAST))
    shutil.copy(folder / "__0_0.distcp", folder / "__5_0.distcp")
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (whole / LAST).iterdir())
    assert_as_uninterrupted(run, whole)
