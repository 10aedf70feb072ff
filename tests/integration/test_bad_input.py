"""``pretrain_camopd.py`` as a command: a mistake ends it with status 2 and one line, and writes nothing.

Every kind of mistake is tried within one process in tests/unit; here it is the command itself, and a resumed run
whose checkpoint a real run has written.
"""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_command, torchrun
from tests.support.worlds import World, make_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def pretrain(flags: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, str(ROOT / "pretrain_camopd.py"), *flags]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.run(program, capture_output=True, text=True, env=os.environ | ranks | environment)


def test_mistakes_are_one_line(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(f'{{"prompt": "{row}"}}\n' for row in range(16)) + "{\n")
    mistakes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"load": tmp_path / "nowhere"}, f"--load {tmp_path / 'nowhere'}: no such folder"),
        ({"domain_prompts": bad}, f"--domain-prompts: {bad} line 17 is not JSON"),
        ({"frobnicate": 3}, "unrecognized arguments: --frobnicate 3"),
    )
    with ThreadPoolExecutor(len(mistakes)) as pool:
        commands = list(pool.map(lambda mistake: pretrain(world.flags(save=save, **mistake[0])), mistakes))
    for ended, (_, words) in zip(commands, mistakes, strict=True):
        assert ended.returncode == 2, ended
        assert ended.stderr.startswith(f"pretrain_camopd.py: error: {words}"), ended.stderr
        assert ended.stderr.count("\n") == 1 and not ended.stdout, ended
        assert not save.exists()


def test_other_ranks_speak_late_and_say_who_they_are(world: World, tmp_path: Path) -> None:
    flags = world.flags(save=tmp_path / "run", global_batch_size=5)
    ended = pretrain(flags, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("pretrain_camopd.py: error on rank 1: --global-batch-size 5: must be a multiple")
    assert not (tmp_path / "run").exists()


def test_under_torchrun_the_line_is_there_once(world: World, tmp_path: Path) -> None:
    """Torchrun turns every exit status into 1 and reports which process failed; the reason is our line alone."""
    log = tmp_path / "log"
    line = torchrun(2, world.flags(save=tmp_path / "run", load=tmp_path / "nowhere"))
    assert run_command(line, log=log) != 0
    said = [text for text in log.read_text().splitlines() if "pretrain_camopd.py: error" in text]
    assert len(said) == 1, log.read_text()
    assert said[0].startswith(f"pretrain_camopd.py: error: --load {tmp_path / 'nowhere'}: no such folder")
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_setting(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    flags = {"save": save, "max_response_length": 4, "train_iters": 1}
    first = pretrain(world.flags(**flags))
    assert first.returncode == 0, first.stderr
    files = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    assert save / "iter_0000001" / ".metadata" in files and save / "metrics.jsonl" in files
    second = pretrain(world.flags(**(flags | {"train_iters": 2, "general_mass_target": 0.5})))
    assert second.returncode == 2 and second.stderr.count("\n") == 1, second
    assert second.stderr.startswith(
        "pretrain_camopd.py: error: --general-mass-target is 0.5, "
        f"but the checkpoint in --save {save} was made with 0.8; "
    )
    assert {path: path.stat().st_mtime_ns for path in save.rglob("*")} == files
