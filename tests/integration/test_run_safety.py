"""Runs that meet damage, full disks, signals and each other: nothing is lost, and nothing goes wrong in silence.

What has to be found before processes meet is found by dry runs in this process; the rest runs the real entry point.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.checksums import SUMS, read_checksums
from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.origin import BEGUN
from megatron_camopd.errors import ConfigurationError
from tests.support.damage import DAMAGE, flip_bit, poison
from tests.support.processes import command, run_ranks, torchrun
from tests.support.runs import assert_same_checkpoint, pretrain, records, without_costs
from tests.support.worlds import World, make_world

STEPS = 4
LAST = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("safety"))


def flags(world: World, save: Path, **changes: Any) -> list[str]:
    """General and domain steps in turn, a checkpoint after each."""
    settings = {"train_iters": STEPS, "save_interval": 1, "recovery_steps": 1, "max_response_length": 8, "lr": 1e-3}
    return world.flags(save=save, **(settings | changes))


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """A run of all steps on two processes."""
    save = world.root / "whole"
    assert run_ranks(told, 2, flags(world, save))[0] == (0, "", 2)
    return save


@pytest.fixture
def run(world: World, whole: Path, tmp_path: Path) -> Path:
    """A copy of the first three steps of that run, as it was after them."""
    save = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(save / LAST)
    (save / TRACKER).write_text(str(STEPS - 1))
    lines = (save / "metrics.jsonl").read_text().splitlines(keepends=True)
    (save / "metrics.jsonl").write_text("".join(lines[: STEPS - 1]))
    return save


def told(line: list[str], limit: int | None = None) -> tuple[int, str, int]:
    """Run the entry point; status, what it wrote to stderr, and the number of lines about checkpoints on stdout."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()) as out:
        status = pretrain(line)
    return status, error.getvalue(), out.getvalue().count("saved ") // 2


def dry_run(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a dry run prints, warnings included."""
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron_camopd.stages.start import run_command

    before = capsys.readouterr()
    assert before is not None
    text = run_command([*line, "--dry-run"])
    return capsys.readouterr().out + (text or "")


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        dry_run(line, capsys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_as_uninterrupted(save: Path, whole: Path) -> None:
    assert list(map(without_costs, records(save))) == list(map(without_costs, records(whole)))
    assert_same_checkpoint(save / LAST, whole / LAST)
    assert (save / TRACKER).read_text() == str(STEPS)
    assert not list(save.glob("run.lock*")) and not (save / BEGUN).exists()


# Damaged checkpoints --------------------------------------------------------------------------------------------

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


# Never anew over a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", [None, "", "7", "rel", "\0"])
def test_without_a_good_tracker_the_newest_complete_one_counts(
    tracker: str | None, world: World, run: Path, whole: Path
) -> None:
    (run / TRACKER).unlink()
    if tracker is not None:
        (run / TRACKER).write_text(tracker)
    half = Path(shutil.copytree(run / "iter_0000003", run / "iter_0000007"))
    (half / ".metadata").unlink()
    line = flags(world, run, save_retain_interval=2)
    assert run_ranks(told, 1 if tracker else 2, line)[0][:2] == (0, "")
    if not tracker:
        assert_as_uninterrupted(run, whole)


def test_records_without_checkpoints_are_left_alone(
    world: World, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in run.glob("iter_*"):
        shutil.rmtree(folder)
    for keep in (TRACKER, None):
        before = snapshot(run)
        line = refused(flags(world, run), capsys)
        assert line == (
            f"--save {run}: holds metrics.jsonl of a run whose checkpoints are gone; restore them, or name a new folder"
        )
        for status, error, _ in run_ranks(told, 1, flags(world, run)):
            assert status == 2 and line in error
        assert snapshot(run) == before
        if keep:
            (run / keep).unlink()


def stop_after(line: list[str], steps: int, rank: int, number: int) -> tuple[int, str]:
    """Train; this process gets a signal when the records hold ``steps`` steps."""
    save = Path(line[line.index("--save") + 1])

    def send() -> None:
        path = save / "metrics.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < steps:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == rank:
        threading.Thread(target=send, daemon=True).start()
    status, error, _ = told(line)
    return status, error


def begin(world: World, save: Path, **changes: Any) -> Path:
    """A run that its time limit of one step ended before any checkpoint: killed, as far as its folder tells."""
    line = flags(world, save, save_interval=None, train_iters=1, **changes)
    assert run_ranks(killed_before_saving, 1, line) == [0]
    assert (save / BEGUN).exists() and len(records(save)) == 1 and not list(save.glob("iter_*"))
    return save


def killed_before_saving(line: list[str]) -> int:
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron_camopd.stages.training_loop import TrainingLoop

    def save(*args: Any) -> None:
        raise KeyboardInterrupt

    setattr(TrainingLoop, "save", save)  # noqa: B010 - assigning to a method
    with contextlib.suppress(KeyboardInterrupt):
        pretrain(line)
    return 0


def test_a_run_killed_before_its_first_checkpoint_begins_again(world: World, whole: Path, tmp_path: Path) -> None:
    save = begin(world, tmp_path / "run")
    (save / "run.lock").write_text(json.dumps({"pid": 2**22 + 3}))
    from megatron_camopd.runtime import lock

    (save / "run.lock").write_text(json.dumps({**lock._this_process(), "pid": 2**22 + 3, "started": "5"}))
    assert run_ranks(told, 2, flags(world, save))[0][:2] == (0, "")
    assert_as_uninterrupted(save, whole)


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"recovery_steps": 2}, {"load": "teacher"}, {"general_teacher_load": "student"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_run_does_not_begin_over_it(
    change: dict[str, Any], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = begin(world, tmp_path / "run")
    before = snapshot(save)
    named = {name: world.root / value if isinstance(value, str) else value for name, value in change.items()}
    line = refused(flags(world, save, **named), capsys)
    assert str(save) in line
    assert snapshot(save) == before


EDITS: dict[str, Callable[[Path], object]] = {
    "chat_template.jinja": lambda path: path.write_text(path.read_text() + "{# edited #}"),
    "generation_config.json": lambda path: path.write_text('{"eos_token_id": [2, 0]}'),
    "tokenizer_config.json": lambda path: path.write_text(path.read_text().replace("{", "{ ", 1)),
    "tokenizer.json": lambda path: path.write_text(path.read_text() + "\n"),
}


@pytest.mark.parametrize("name", EDITS)
def test_files_of_the_model_are_part_of_the_run(
    name: str, world: World, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EDITS[name](run / "hf" / name)
    line = refused(flags(world, run), capsys)
    assert line.startswith(f"{run / 'hf' / name}: was changed since the run in --save {run} began")
    (run / "hf" / name).unlink()
    assert f"{name}: is missing since" in refused(flags(world, run), capsys)
    (run / "hf" / "added_tokens.json").write_text("{}")
    assert "added_tokens.json: is new since" in refused(flags(world, run), capsys)


# Saves that fail, signals, orphans ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_fails_is_one_line(ranks: int, world: World, run: Path, whole: Path) -> None:
    """A file may not grow beyond 60 kB, which stands for a full disk; afterwards the same command goes on."""
    before = snapshot(run)
    results = run_ranks(told, ranks, flags(world, run), 60_000)
    assert all(status == 75 for status, _, _ in results)
    error = results[0][1]
    assert error.count("\n") == 1 and f"{run / LAST}: cannot be saved (File too large)" in error
    after = snapshot(run)
    assert {name for name in after if name not in before} == set()
    assert {name for name in before if after[name] != before[name]} == {"metrics.jsonl"}
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert_as_uninterrupted(run, whole)


def train_on_a_full_disk_of_rank_1(line: list[str]) -> tuple[int, str]:
    """Train; only the second process finds the disk full."""
    status, error, _ = told(line, 60_000 if os.environ["RANK"] == "1" else None)
    return status, error


def test_a_save_that_fails_on_one_rank_ends_all(world: World, run: Path, whole: Path) -> None:
    results = run_ranks(train_on_a_full_disk_of_rank_1, 2, flags(world, run))
    assert [status for status, _ in results] == [75, 75]
    assert all(f"{run / LAST}: cannot be saved (File too large)" in error for _, error in results)
    assert not (run / LAST / SUMS).exists() and (run / TRACKER).read_text() == str(STEPS - 1)
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert_as_uninterrupted(run, whole)


def train_into_full_records(line: list[str]) -> tuple[int, str]:
    """Train; from its first record on, no file may grow beyond the size that the records have then."""
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron_camopd.stages.metrics import MetricsLog

    path = Path(line[line.index("--save") + 1]) / "metrics.jsonl"
    write = MetricsLog.write

    def limited(self: MetricsLog, record: dict[str, Any]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, resource.RLIM_INFINITY))
        write(self, record)

    setattr(MetricsLog, "write", limited)  # noqa: B010 - assigning to a method
    status, error, _ = told(line)
    return status, error


def test_records_that_cannot_be_written(world: World, run: Path, whole: Path) -> None:
    status, error = run_ranks(train_into_full_records, 1, flags(world, run))[0]
    assert status == 75 and error.count("\n") == 1
    assert f"{run / 'metrics.jsonl'}: cannot be written (File too large)" in error
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert_as_uninterrupted(run, whole)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM)])
def test_a_signal_saves_and_ends(rank: int, number: int, world: World, whole: Path, tmp_path: Path) -> None:
    """The signal reaches one process only; both save the same step, and the same command goes on from there."""
    save = tmp_path / "run"
    line = flags(world, save, save_interval=None)
    results = run_ranks(stop_after, 2, line, 1, rank, int(number))
    assert [status for status, _ in results] == [75, 75]
    saved = int((save / TRACKER).read_text())
    assert 1 <= saved < STEPS and len(records(save)) == saved
    assert f"SIGTERM: saved {saved} of {STEPS} steps to {save}; run the same command again" in results[0][1]
    assert results[1][1] == ""
    assert run_ranks(told, 2, flags(world, save))[0][:2] == (0, "")
    assert_as_uninterrupted(save, whole)


def test_two_runs_and_orphans(world: World, tmp_path: Path) -> None:
    """With torchrun itself: the second run names the first and ends; the first one's processes end with torchrun."""
    save, log, other = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    line = flags(world, save, train_iters=100_000, save_interval=50_000)
    with command(torchrun(2, line), log=log) as process:
        deadline = time.monotonic() + 120
        while not (save / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        holder = json.loads((save / "run.lock").read_text())["pid"]
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert holder in workers and len(workers) == 2
        before = (save / BEGUN).read_bytes()
        for second in (line, flags(world, save, seed=9)):
            with other.open("w") as output, contextlib.redirect_stdout(output):
                results = run_ranks(told, 1, second)
            assert results[0][0] == 2
        status, error, _ = run_ranks(told, 1, line)[0]
        assert status == 2 and f"--save {save}: process {holder} on " in error and "writes to it" in error
        assert (save / BEGUN).read_bytes() == before
        os.kill(process.pid, signal.SIGKILL)  # torchrun alone, as the out-of-memory killer would
        process.wait()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers if Path(f"/proc/{pid}").exists()):
            assert time.monotonic() < deadline, "orphans go on training"
            time.sleep(0.02)
    assert (save / "run.lock").exists()
    assert run_ranks(told, 1, flags(world, save, train_iters=2, save_interval=2))[0][:2] == (0, "")


# Odd states and folders -----------------------------------------------------------------------------------------

ODD_STATES: list[Any] = [
    {},
    {"settings": 5},
    {"settings": {}},
    {"settings": {}, "origin": []},
    {"settings": {}, "origin": {"assets": 5}},
    {"settings": {}, "origin": {"assets": {}, "student": []}, "branches": 3},
]


@pytest.mark.parametrize("state", ODD_STATES, ids=str)
@pytest.mark.parametrize("stage", ["distill", "sft"])
def test_odd_beginnings_are_one_line(
    stage: str, state: Any, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "run"
    save.mkdir()
    (save / BEGUN).write_text(json.dumps(state))
    line = refused(flags(world, save) if stage == "distill" else sft(world, save), capsys)
    assert str(save) in line


def sft(world: World, save: Path, *more: str) -> list[str]:
    rows = save.parent / "conversations.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    return [
        "--stage", "sft", "--load", str(world.student), "--save", str(save), "--conversations", str(rows),
        "--seq-length", "64", "--global-batch-size", "2", "--train-iters", "2", *more,
    ]  # fmt: skip


def test_what_an_earlier_run_left_in_hf_is_replaced(world: World, tmp_path: Path) -> None:
    """Somebody removed the checkpoints of another model's run by hand, but not hf/: the new run brings its own."""
    save = tmp_path / "run"
    shutil.copytree(world.student / "hf", save / "hf")
    template = save / "hf" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# old #}")
    (save / "hf" / "added_tokens.json").write_text("{}")
    for steps in (1, 2):
        line = flags(world, save, train_iters=steps)
        assert run_ranks(told, 1, line)[0][:2] == (0, "")
    assert snapshot(save / "hf") == snapshot(world.student / "hf")


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


def test_one_line_without_a_launcher(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_camopd.stages.start import run_command

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match="start the command with torchrun"):
        run_command(flags(world, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_signals_that_nobody_handles(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([*flags(world, tmp_path / "run"), "--exit-signal", name], capsys)
    assert line == f"--exit-signal {name}: cannot be handled; name another signal"


def test_a_folder_of_these_steps_is_written_anew(world: World, run: Path, whole: Path) -> None:
    """Also with files of more processes than the run has now, which nobody would hash."""
    folder = Path(shutil.copytree(run / "iter_0000003", run / LAST))
    shutil.copy(folder / "__0_0.distcp", folder / "__5_0.distcp")
    assert run_ranks(told, 2, flags(world, run))[0][:2] == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (whole / LAST).iterdir())
    assert_as_uninterrupted(run, whole)


def test_mistakes_that_one_process_finds_reach_all_nodes(world: World, tmp_path: Path) -> None:
    """Two torchruns as on two nodes; the rows are read by rank 0 alone, and both nodes say what is wrong with them."""
    from megatron_camopd.runtime.startup import single_process_environment

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "refuse this"}]}) + "\n")
    line = flags(world, tmp_path / "run", general_prompts=rows)
    port = single_process_environment()["MASTER_PORT"]
    logs = [tmp_path / f"node{node}.log" for node in (0, 1)]
    with contextlib.ExitStack() as stack:
        processes = []
        for node, log in enumerate(logs):
            words = torchrun(1, line)
            place = words.index("--standalone")
            words[place : place + 1] = [
                "--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port
            ]  # fmt: skip
            processes.append(stack.enter_context(command(words, log=log)))
        assert all(process.wait(150) != 0 for process in processes)
    for log in logs:
        text = log.read_text()
        assert f"--general-prompts: {rows} line 1" in text and "exitcode  : 2" in text, text[-3000:]
        assert "DistNetworkError" not in text and 'pretrain_camopd.py", line' not in text
    assert not (tmp_path / "run").exists()
