"""Runs that stop and go on: after a kill, at another parallel layout, with the optimizer's state in shards.

The first part drives the real command under torchrun. The others call the same entry point on forked processes, which
saves them the imports.
"""

import functools
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from tests.support.processes import ROOT, command, kill_session, run_command, run_ranks, torchrun
from tests.support.runs import assert_same_checkpoint, pretrain, records, stored, without_costs
from tests.support.worlds import World, make_checkpoint, write_prompts

PP2 = {"pipeline_model_parallel_size": 2}
PP2_UNEVEN = PP2 | {"decoder_last_pipeline_num_layers": 3}
TP2 = {"tensor_model_parallel_size": 2}
STEPS, INTERVAL = 10, 4
VOCABULARY = 300
PROMPTS = [[5, 9, 200, 31], [7, 100, 3], [12, 12, 260, 8, 99, 41]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Models whose distributions are far from uniform, so that gaps and gradients are too."""
    made = World(tmp_path_factory.mktemp("resume"))
    for seed, folder in enumerate((made.student, made.teacher)):
        make_checkpoint(folder, seed=seed, vocab_size=VOCABULARY, num_hidden_layers=4, initializer_range=0.1)
    write_prompts(made.general, "general")
    write_prompts(made.domain, "domain")
    return made


def train_flags(world: World, save: Path, **changes: Any) -> list[str]:
    """General and domain steps in turn, with a learning rate under which both models soon differ."""
    settings = {
        "recovery_steps": 1,
        "train_iters": STEPS,
        "save_interval": INTERVAL,
        "max_response_length": 8,
        "micro_batch_size": 2,
        "lr": 1e-3,
    }
    return world.flags(save=save, **(settings | changes))


# Killed in the middle of a step --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(world: World) -> dict[str, Any]:
    """Run A uninterrupted; run B killed past its first checkpoint, then started again with the same command."""
    whole, killed = world.root / "whole", world.root / "killed"
    log = world.root / "killed.log"
    with command(torchrun(1, train_flags(world, killed)), log=log) as process:
        deadline = time.monotonic() + 300
        while not (killed / "metrics.jsonl").exists() or len(records(killed)) < INTERVAL + 1:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.005)
        kill_session(process)
    before = {"steps": [record["step"] for record in records(killed)], "tracker": (killed / TRACKER).read_text()}
    status = run_command(torchrun(1, train_flags(world, killed)), log=log, time_limit=300)
    assert status == 0, log.read_text()[-3000:]
    log = world.root / "whole.log"
    assert run_command(torchrun(1, train_flags(world, whole)), log=log, time_limit=300) == 0, log.read_text()[-3000:]
    return {"whole": whole, "killed": killed, "before": before, "log": (world.root / "killed.log").read_text()}


def test_the_kill_came_between_checkpoints(interrupted: dict[str, Any]) -> None:
    before = interrupted["before"]
    saved = int(before["tracker"])
    assert saved in range(INTERVAL, STEPS, INTERVAL)
    assert saved < len(before["steps"]) < STEPS  # there were records that the checkpoint does not hold
    assert f"resuming after {saved} of {STEPS} steps" in interrupted["log"]


def test_a_killed_run_ends_bit_identical(interrupted: dict[str, Any]) -> None:
    last = f"iter_{STEPS:07d}"
    assert_same_checkpoint(interrupted["killed"] / last, interrupted["whole"] / last)
    assert (interrupted["killed"] / TRACKER).read_text() == (interrupted["whole"] / TRACKER).read_text() == str(STEPS)


def test_metrics_hold_every_step_once(interrupted: dict[str, Any]) -> None:
    resumed, whole = records(interrupted["killed"]), records(interrupted["whole"])
    assert [record["step"] for record in whole] == list(range(STEPS))
    assert [without_costs(record) for record in resumed] == [without_costs(record) for record in whole]
    assert [record["branch"] for record in whole] == ["general", "domain"] * (STEPS // 2)


def test_the_domain_teacher_stays_the_initial_student(world: World, interrupted: dict[str, Any]) -> None:
    """Its gap grows with the steps and continues after the resume; a teacher loaded anew would have gap 0 there."""
    gaps = {record["step"]: record["gap_abs_mean"] for record in records(interrupted["killed"])}
    assert 1e-3 < gaps[1] < gaps[INTERVAL + 1]
    tensors = stored(interrupted["killed"] / f"iter_{INTERVAL:07d}")
    reader = TorchDistReader(world.student / "release")
    key = "decoder.final_layernorm.weight"
    assert not torch.equal(tensors[key], reader.read(key, (0,), reader.shapes[key]))  # the student did move


# Given more steps ----------------------------------------------------------------------------------------------


def test_a_finished_run_given_more_steps_ends_as_the_longer_run(world: World) -> None:
    """3 steps, then 4 in all: bit for bit the uninterrupted run of 4, whose warm-up the first 3 had not finished."""
    whole, extended = world.root / "four", world.root / "three-then-four"
    for save, steps in ((whole, 4), (extended, 3), (extended, 4)):
        flags = train_flags(world, save, train_iters=steps, save_interval=None, lr_warmup_iters=3)
        assert run_ranks(pretrain, 1, flags) == [0]
    assert (extended / TRACKER).read_text() == "4"
    assert list(map(without_costs, records(extended))) == list(map(without_costs, records(whole)))
    rates = [record["learning_rate"] for record in records(extended)]
    assert rates == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    assert_same_checkpoint(extended / "iter_0000004", whole / "iter_0000004")


# bf16, the optimizer's state in shards or whole -----------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": PP2, "pp2-uneven": PP2_UNEVEN, "tp2": TP2 | {"sequence_parallel": True}, "dp2": {},
    "cp2": {"context_parallel_size": 2},
}  # fmt: skip


@functools.cache
def bf16_run(world: World, start: str, name: str, *, sharded: bool = True) -> Path:
    """``whole``: to the end at layout ``start``; ``stopped``: INTERVAL steps of it; a layout: those, resumed there."""
    save = world.root / f"{start}-{name}-{'sharded' if sharded else 'plain'}"
    options: dict[str, Any] = {"bf16": True, "train_iters": INTERVAL + 2}
    if sharded:
        options["use_distributed_optimizer"] = True
    if name == "stopped":
        options["exit_interval"] = INTERVAL
    elif name != "whole":
        shutil.copytree(bf16_run(world, start, "stopped", sharded=sharded), save)
    line = train_flags(world, save, **options, **LAYOUTS[name if name in LAYOUTS else start])
    assert run_ranks(pretrain, 2, line) == [0, 0]
    return save


def test_exit_interval_leaves_a_checkpoint(world: World) -> None:
    stopped = bf16_run(world, "pp2", "stopped")
    assert (stopped / TRACKER).read_text().strip() == str(INTERVAL) and len(records(stopped)) == INTERVAL


@pytest.mark.parametrize(("layout", "sharded"), [("pp2", True), ("tp2", True), ("tp2", False), ("cp2", True)])
def test_bf16_runs_resume_bit_identical(world: World, layout: str, sharded: bool) -> None:
    whole, resumed = (bf16_run(world, layout, name, sharded=sharded) for name in ("whole", layout))
    assert list(map(without_costs, records(resumed))) == list(map(without_costs, records(whole)))
    assert_same_checkpoint(resumed / f"iter_{INTERVAL + 2:07d}", whole / f"iter_{INTERVAL + 2:07d}")


@pytest.mark.parametrize(
    ("start", "layout"), [("pp2", "tp2"), ("pp2", "dp2"), ("pp2", "cp2"), ("pp2", "pp2-uneven"), ("tp2", "pp2-uneven")]
)
def test_sharded_optimizer_resumes_at_another_layout(world: World, start: str, layout: str) -> None:
    """bf16 rounds otherwise at another layout, so a sampled token may differ: close, not equal."""
    expected, found = records(bf16_run(world, start, "whole")), records(bf16_run(world, start, layout))
    assert [record["step"] for record in found] == list(range(INTERVAL + 2))
    for record, wanted in zip(found[INTERVAL:], expected[INTERVAL:], strict=True):
        assert record["skipped"] == 0
        assert record["gap_abs_mean"] == pytest.approx(wanted["gap_abs_mean"], rel=0.2)
        assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.3)
    last = f"iter_{INTERVAL + 2:07d}"
    tensors = stored(bf16_run(world, start, layout) / last)
    wanted_tensors = stored(bf16_run(world, start, "whole") / last)
    before = stored(bf16_run(world, start, "stopped") / f"iter_{INTERVAL:07d}")
    moments = [key for key in before if key.startswith("optimizer.state.exp_avg_sq.")]
    assert moments and all(tensors[key].isfinite().all() for key in moments)
    # The moments went on from where they were: what two steps more of other rounding change is small beside it.
    for key in moments:
        rows = VOCABULARY if "embedding" in key or "output_layer" in key else None  # padding depends on the layout
        apart = (tensors[key][:rows].double() - wanted_tensors[key][:rows].double()).norm()
        assert apart < 0.1 * wanted_tensors[key].double().norm(), key


# Other layouts and Hugging Face --------------------------------------------------------------------------------


def score(line: list[str]) -> Tensor:
    """Log-probabilities [N, R] of PROMPTS' tokens after the first, under the model that ``line`` loads."""
    from megatron_camopd.batch import RolloutBatch
    from megatron_camopd.model.passes import PassSettings, score_responses
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    tokens = torch.zeros(len(PROMPTS), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    rollout = RolloutBatch(
        indices=torch.arange(len(PROMPTS)),
        tokens=tokens,
        prompt_lengths=torch.ones_like(lengths),
        response_lengths=lengths - 1,
        rollout_logprobs=torch.zeros(len(PROMPTS), int(lengths.max()) - 1),
        truncated=torch.zeros(len(PROMPTS), dtype=torch.bool),
    )
    return score_responses(PassSettings.of(args), trainer.model, rollout)


def export_and_score(run: Path, target: Path) -> Tensor:
    """Return what :func:`score` gives, by the exported Hugging Face model."""
    log = target.with_suffix(".log")
    converter = [sys.executable, str(ROOT / "checkpoints_convert" / "megatron_to_hf.py")]
    assert run_command([*converter, "--load", str(run), "--save", str(target)], log=log) == 0, log.read_text()[-3000:]
    model = AutoModelForCausalLM.from_pretrained(target)
    assert AutoTokenizer.from_pretrained(target).eos_token == "<|im_end|>"
    rows = []
    for prompt in PROMPTS:
        tokens = torch.tensor(prompt)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1].double(), dim=-1)
        chosen = logprobs.gather(1, tokens[1:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(chosen, (0, max(map(len, PROMPTS)) - len(prompt))))
    return torch.stack(rows).float()


@pytest.mark.parametrize("trained_at", ["tp1", "tp2-pp2"])
def test_trained_checkpoints_load_elsewhere_and_export(
    world: World, interrupted: dict[str, Any], trained_at: str, tmp_path: Path
) -> None:
    run = interrupted["whole"]
    if trained_at == "tp2-pp2":
        run = tmp_path / "run"
        assert run_ranks(pretrain, 4, train_flags(world, run, **TP2, **PP2_UNEVEN, train_iters=2)) == [0] * 4
    expected = export_and_score(run, tmp_path / "hf")
    before = run_ranks(score, 1, train_flags(world, tmp_path / "none", load=world.student))[0]
    assert (expected - before).abs().max() > 1e-2  # training changed the model
    line = train_flags(world, tmp_path / "unused", load=run, **({} if trained_at == "tp2-pp2" else TP2 | PP2_UNEVEN))
    for logprobs in run_ranks(score, 1 if trained_at == "tp2-pp2" else 4, line):
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
