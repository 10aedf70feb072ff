"""Small runs of the real entry point, to be damaged, ended and resumed: flags, what they say, what they leave."""

import contextlib
import io
import resource
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.origin import BEGUN
from megatron_camopd.errors import ConfigurationError
from tests.support.runs import assert_same_checkpoint, pretrain, records, without_costs
from tests.support.worlds import World

STEPS = 4
LAST = f"iter_{STEPS:07d}"


def flags(world: World, save: Path, **changes: Any) -> list[str]:
    """General and domain steps in turn, a checkpoint after each."""
    settings = {"train_iters": STEPS, "save_interval": 1, "recovery_steps": 1, "max_response_length": 8, "lr": 1e-3}
    return world.flags(save=save, **(settings | changes))


def told(line: list[str], limit: int | None = None) -> tuple[int, str, int]:
    """Run the entry point; status, what it wrote to stderr, and the number of lines about checkpoints on stdout."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()) as out:
        status = pretrain(line)
    return status, error.getvalue(), out.getvalue().count("saved ") // 2


def dry_run(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a dry run prints, warnings included."""
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
