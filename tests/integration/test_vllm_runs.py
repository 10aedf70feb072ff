"""A run with ``--rollout-engine vllm``: thirty steps, then too short a time limit, then a kill in mid-generation.

One run in three parts, each going on where the one before was stopped. The first calls the entry point on forked
processes, to watch them; the others are the real command under torchrun. Tensor parallel 2 in training and in the one
engine, whose ranks share memory of the machine.
"""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.directory import TRACKER
from tests.support.processes import command, run_command, run_ranks, torchrun
from tests.support.worlds import World, make_checkpoint, write_prompts

pytestmark = pytest.mark.vllm

STEADY, STEPS = 30, 33  # steps done when the time limit comes, and in all
RESPONSE = 150  # tokens; generation is most of a step, so that a kill half-way meets it
VOCABULARY = 4096  # ids, of which one or two end a response


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("vllm-runs"))
    for seed, folder in enumerate((made.student, made.teacher)):
        make_checkpoint(
            folder, seed=seed, vocab_size=VOCABULARY, head_dim=32, initializer_range=0.2, max_position_embeddings=256
        )
    write_prompts(made.general, "general")
    write_prompts(made.domain, "domain")
    return made


def train_flags(world: World, **changes: Any) -> list[str]:
    settings = {
        "rollout_engine": "vllm",
        "rollout_tensor_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "rollout_kv_cache_bytes": "16MiB",
        "save": world.root / "run",
        "train_iters": STEPS,
        "max_response_length": RESPONSE,
        "lr": 1e-3,
    }
    return world.flags(**(settings | changes))


def records(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


# Processes, by what the kernel says of them --------------------------------------------------------------------


def descendants(pid: int) -> dict[int, str]:
    """``pid`` and all processes below it, with the time they started: an id may be another's later."""
    found = {pid: started(pid)}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found |= descendants(int(child))
    return found


def started(pid: int) -> str:
    """When ``pid`` started, in clock ticks since the machine did; "" if it is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def workers(processes: dict[int, str]) -> list[int]:
    """The ranks among ``processes``: they run the script, which the launcher only has in its arguments."""
    found = []
    for pid in processes:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        is_launcher = b"torch.distributed.run" in arguments
        if not is_launcher and any(word.endswith(b"pretrain_camopd.py") for word in arguments):
            found.append(pid)
    return found


def shared_memory(processes: dict[int, str]) -> set[str]:
    """Names in /dev/shm that ``processes`` have mapped; others of this machine are none of our business."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in processes)
    return set(re.findall(r"/dev/shm/\S+", maps))


def left_behind(processes: dict[int, str], mapped: set[str]) -> list[Any]:
    """Return which of ``processes`` still live, and which of the names ``mapped`` still exist."""
    alive: list[Any] = [pid for pid, start in processes.items() if start and started(pid) == start]
    return alive + [name for name in mapped if os.path.exists(name)]


# Thirty steps -----------------------------------------------------------------------------------------------------


def steady_main(line: list[str]) -> dict[str, Any]:
    """The entry point, watched: resident bytes before every step; in step STEADY the engine's clock leaps."""
    import pretrain_camopd
    from megatron_camopd.rollout import vllm_engine
    from megatron_camopd.stages.distill.runner import DistillRunner

    resident: list[int] = []
    train_step = DistillRunner.train_step

    def watched(trainer: Any) -> dict[str, Any]:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        if trainer.step == STEADY:
            leaping: Any = types.SimpleNamespace(monotonic=itertools.count(0, 1000).__next__)
            vllm_engine.time = leaping
        return train_step(trainer)

    DistillRunner.train_step = watched  # type: ignore[method-assign, assignment]
    sys.argv = ["pretrain_camopd.py", *line]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = pretrain_camopd.main()
    tracker = Path(line[line.index("--save") + 1], TRACKER).read_text()
    return {"resident": resident, "status": status, "told": told.getvalue(), "tracker": tracker}


@pytest.fixture(scope="module")
def steady(world: World) -> list[dict[str, Any]]:
    line = train_flags(world, save_interval=STEPS, rollout_time_limit=900)
    return run_ranks(steady_main, 2, line, time_limit=180)


def test_memory_stays_flat(steady: list[dict[str, Any]]) -> None:
    """Allocators take a few MiB more until some 60 steps; a copy of the weights left by every synchronisation is 23."""
    for rank in steady:
        assert rank["resident"][STEADY] - rank["resident"][10] < 10 * 2**20, rank["resident"]


def test_an_engine_out_of_time_leaves_a_checkpoint_of_the_steps_done(steady: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(steady):
        where = " on rank 1" if number else ""
        assert rank["status"] == os.EX_TEMPFAIL
        assert rank["told"] == (
            f"pretrain_camopd.py: error{where}: --rollout-engine vllm, step {STEADY}: 4 of 4 responses of engine 0 had "
            "not ended after --rollout-time-limit 900 s\n"
        )
        assert rank["tracker"] == str(STEADY)  # saved because it failed


# Killed in the middle of generation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(world: World, steady: list[dict[str, Any]]) -> dict[str, Any]:
    """The run goes on without a time limit, one rank is killed in its second step; then the same command again."""
    save, log = world.root / "run", world.root / "killed.log"
    line = torchrun(2, train_flags(world, save_interval=1))
    with command(line, log=log) as launcher:
        deadline = time.monotonic() + 150
        while (save / TRACKER).read_text() != str(STEADY + 1):
            assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.01)
        saved = time.monotonic()
        time.sleep(records(save)[-1]["time_rollout"] / 2)  # however fast this machine is
        processes = descendants(launcher.pid)
        ranks, mapped = workers(processes), shared_memory(processes)
        os.kill(ranks[-1], signal.SIGKILL)
        result: dict[str, Any] = {"killed after": time.monotonic() - saved, "ranks": len(ranks)}
        result["launcher"] = launcher.wait(timeout=60)
    while (left := left_behind(processes, mapped)) and time.monotonic() < saved + 30:
        time.sleep(0.05)  # Python's helper processes end a moment after the process that they clean up behind
    result["left"], result["mapped"] = left, mapped
    result["records"] = len(records(save))
    result["resumed"] = run_command(line, log=log, time_limit=150)
    result["log"] = log.read_text()
    return result


def test_a_kill_during_generation_leaves_nothing_behind(world: World, killed: dict[str, Any]) -> None:
    assert killed["ranks"] == 2 and killed["launcher"] == 1
    assert killed["records"] == STEADY + 1 and killed["killed after"] > records(world.root / "run")[-1]["time_sync"]
    assert any("camopd" in name for name in killed["mapped"]), "the ranks of the engine share memory"
    assert not killed["left"]


def test_the_same_command_resumes_and_finishes(world: World, killed: dict[str, Any]) -> None:
    assert killed["resumed"] == 0, killed["log"][-3000:]
    for done in (STEADY, STEADY + 1):
        assert f"resuming after {done} of {STEPS} steps" in killed["log"]
    assert (world.root / "run" / TRACKER).read_text() == str(STEPS)


def test_engine_and_trainer_agree_at_every_step(world: World, killed: dict[str, Any]) -> None:
    found = records(world.root / "run")
    assert [record["step"] for record in found] == list(range(STEPS))
    for record in found:
        assert 0.0 < record["rollout_train_logprob_abs_diff"] <= record["rollout_train_logprob_abs_diff_max"] < 1e-3
        assert record["time_sync"] > 0.0 and record["skipped"] == 0
    assert {record["branch"] for record in found} == {"general", "domain"}
