"""One training step of every method that mixes both branches, on every parallel layout, against float64.

As ``test_layouts``, with its world, tolerances and helpers: Hugging Face's Qwen3 scores the rollouts of the step in
float64, every sample by its own branch's teacher, and the papers' formulas are spelled out on that. What is new here:
prompts of both branches in one batch, token weights, the reward floor, entropies, top ids and draws over vocabulary
shards (300 ids are cut into 256 and 44).
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.counter_random import hash_counters, uniform
from tests.support.layouts import (
    TEMPERATURES,
    join,
    reference_logprobs,
    relative_error,
    watched_step,
    world_root,
)
from tests.support.layouts import flags as layout_flags
from tests.support.processes import run_ranks

LAYOUTS = ("tp1", "tp2", "pp2", "dp2", "cp2", "tp2-sp")
MODEL, GENERAL, DOMAIN, SWITCH, SEED = "untied", 6, 2, 4, 11
FLOOR = {"scaled-log": math.log(0.3) / 0.7, "logit": math.log(0.3 / 0.7)}
# name of the step -> its number, and the flags of its method
STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "mopd": (0, {"distill_method": "mopd"}),
    "relaxed, phase 1": (1, {"distill_method": "relaxed-opd", "relaxed_opd_floor": "scaled-log"}),
    "relaxed, phase 2": (5, {"distill_method": "relaxed-opd", "relaxed_opd_floor": "logit"}),
    "greedy": (2, {"distill_method": "selectkd", "selectkd_verification": "greedy", "selectkd_candidates": 60}),
    "speculative": (
        3,
        {"distill_method": "selectkd", "selectkd_verification": "speculative", "selectkd_candidates": 3},
    ),
}
OPTIONS = {
    "mixing_ratio": [3, 1], "relaxed_opd_lambda": 0.3, "relaxed_opd_entropy_fraction": 0.25,
    "relaxed_opd_switch_step": SWITCH, "selectkd_rejected_weight": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


def flags(root: Path, layout: str) -> list[str]:
    """``test_layouts``' command line, with the flags of Vanilla MOPD in place of CaMOPD's."""
    line = layout_flags(root, MODEL, layout)
    for name in ("--recovery-steps", "--general-feedback-scale", "--domain-feedback-scale"):
        place = line.index(name)
        del line[place : place + 2]
    return [*line, "--distill-method", "mopd", "--mixing-ratio", "3:1", "--seed", str(SEED)]


def rank_main(line: list[str]) -> dict[str, Any]:
    """The steps of STEPS, each from the checkpoint's weights."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from megatron_camopd.objective.registry import METHODS
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    model = unwrap_model(trainer.model[0])
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = {}
    for name, (number, settings) in STEPS.items():
        for key, parameter in model.named_parameters():
            parameter.data.copy_(initial[key])
        vars(args).update(OPTIONS | settings)
        trainer.step, trainer.method = number, METHODS[args.distill_method].build(args, trainer.plan.table.branches)
        _, steps[name] = watched_step(trainer)
    place = {"tp": parallel_state.get_tensor_model_parallel_rank()}
    return {"steps": steps, "place": place}


@functools.cache
def run_layout(parent: Path, layout: str) -> list[dict[str, Any]]:
    ranks = 1 if layout == "tp1" else 2
    return run_ranks(rank_main, ranks, flags(world_root(parent, MODEL), layout))


# The reference ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def distributions(folder: Path, rollout: RolloutBatch) -> list[Tensor]:
    """Return, for every response token, log-probabilities of all ids: [L_i, 300] float64 per sample."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    rows = []
    for row in range(len(rollout)):
        prompt, response = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        logits = model(rollout.tokens[row, None, : prompt + response]).logits[0, prompt - 1 : -1]
        rows.append(torch.log_softmax(logits / TEMPERATURES[MODEL], dim=-1))
    return rows


def verified(step: str, rollout: RolloutBatch, student: list[Tensor], teacher: list[Tensor]) -> list[list[bool]]:
    """SelecTKD's verdict on every response token."""
    verdicts = []
    for row, (own, judge) in enumerate(zip(student, teacher, strict=True)):
        marks = []
        for place in range(len(own)):
            if step == "greedy":
                marks.append(int(own[place].argmax()) in judge[place].topk(60).indices.tolist())
                continue
            numbers = [
                uniform(hash_counters(SEED, purpose, 3, rollout.indices[row], place, torch.arange(3)))
                for purpose in (1, 2)
            ]
            drawn = torch.searchsorted(own[place].exp().cumsum(0), numbers[0], right=True)  # by inversion
            ratio = (judge[place][drawn] - own[place][drawn]).exp()
            marks.append(bool((numbers[1] < ratio).any()))
        verdicts.append(marks)
    return verdicts


@functools.cache
def reference(parent: Path, step: str) -> dict[str, Any]:
    """Token weights, loss and gradients from the rollouts of the one-process layout."""
    root, number = world_root(parent, MODEL), STEPS[step][0]
    rollout = RolloutBatch(**run_layout(parent, "tp1")[0]["steps"][step]["rollout"])
    mask = rollout.response_mask
    all_teachers = {name: distributions(root / f"{name}-hf", rollout) for name in ("teacher", "domain-teacher")}
    judges = all_teachers["teacher"][:GENERAL] + all_teachers["domain-teacher"][GENERAL:]
    own = distributions(root / "student-hf", rollout)
    student, network = reference_logprobs(root / "student-hf", rollout, TEMPERATURES[MODEL])
    teacher, entropy = torch.zeros_like(student), torch.zeros_like(student)
    for row, length in enumerate(rollout.response_lengths.tolist()):
        start = int(rollout.prompt_lengths[row])
        ids = rollout.tokens[row, start : start + length]
        teacher[row, :length] = judges[row].gather(1, ids[:, None]).squeeze(1)
        entropy[row, :length] = -(own[row].exp() * own[row]).sum(dim=1)
    advantage = teacher - student.detach()
    coefficients = mask / (8 * rollout.response_lengths[:, None].double())
    kept = mask.clone()
    if step.startswith("relaxed"):
        floor = FLOOR[STEPS[step][1]["relaxed_opd_floor"]]
        if number < SWITCH:
            kept &= advantage >= floor
        else:
            limit = entropy[mask].sort(descending=True).values[math.ceil(0.25 * int(mask.sum())) - 1]
            kept &= entropy >= limit
        coefficients = kept / kept.sum().double()
        advantage = advantage.clamp(min=floor)
    elif step in ("greedy", "speculative"):
        for row, marks in enumerate(verified(step, rollout, own, judges)):
            kept[row, : len(marks)] = torch.tensor(marks)
        coefficients = coefficients * torch.where(kept, 1.0, 0.05)
    ratio = (student.detach() - rollout.rollout_logprobs.double()).exp()
    weight = torch.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0.0)
    terms = coefficients * weight * advantage * student
    loss = -terms[mask].sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {
        "teacher": teacher,
        "entropy": entropy,
        "kept": kept,
        "tokens": int(mask.sum()),
        "coefficients": coefficients,
        "loss": float(loss.detach()),
        "magnitude": float(terms[mask].detach().abs().sum()),
        "gradients": gradients,
    }


# The tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_steps_are_worth_comparing(parent: Path, step: str) -> None:
    """Some tokens are kept and some not, in samples of both branches; the loss is not nearly zero."""
    expected = reference(parent, step)
    kept = int(expected["kept"].sum())
    assert kept == expected["tokens"] if step == "mopd" else 3 < kept < expected["tokens"] - 3
    assert expected["kept"][:GENERAL].any() and expected["kept"][GENERAL:].any()
    assert abs(expected["loss"]) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", STEPS)
def test_step_of_a_mixed_method(parent: Path, step: str, layout: str) -> None:
    ranks = run_layout(parent, layout)
    expected, alone = reference(parent, step), run_layout(parent, "tp1")[0]["steps"][step]
    for rank in ranks:
        found = rank["steps"][step]
        width = alone["rollout"]["tokens"].shape[1]
        assert torch.equal(found["rollout"]["tokens"][:, :width], alone["rollout"]["tokens"])
        mask = RolloutBatch(**found["rollout"]).response_mask
        for name, value in (("teacher_logprobs", "teacher"), ("student_entropies", "entropy")):
            torch.testing.assert_close(found[name].double(), expected[value], rtol=1e-5, atol=2e-5)
        if step in ("greedy", "speculative"):
            assert torch.equal(found["accepted"], expected["kept"])
            rate = int(expected["kept"].sum()) / expected["tokens"]
            assert found["record"]["acceptance_rate"] == pytest.approx(rate)
        torch.testing.assert_close(found["coefficients"].double(), expected["coefficients"], rtol=1e-6, atol=0.0)
        assert not found["coefficients"][~mask].any()
        record = found["record"]
        assert record["branch"] == "mixed" and record["skipped"] == 0
        assert record["loss"] == pytest.approx(expected["loss"], abs=3e-6 * expected["magnitude"])
    gradients = join(parent, MODEL, ranks, lambda rank: rank["steps"][step]["gradients"])
    assert gradients.keys() == expected["gradients"].keys()
    for name, gradient in gradients.items():
        error = relative_error(gradient, expected["gradients"][name])
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"
