"""Scoring and training of ragged sequences, packed, against one unpadded sequence at a time in float64.

The lengths are far apart, so micro-batches hold several sequences, sequences are longer than others' chunks, and in one
of the cases data-parallel ranks have nothing to train.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.layouts import LAYOUTS, join, named_by_table, reference_logprobs, relative_error, world_root
from tests.support.processes import run_ranks
from tests.support.ragged import CASES, LENGTHS, coefficients, ragged
from tests.support.worlds import World

NAMES = ("tp1", "dp2", "tp2-sp", "cp2", "cp4", "cp2-dp2", "cp2-pp2", "cp2-tp2-sp", "pp2-uneven")
MODEL, TEMPERATURE, BUDGET = "untied", 0.7, 150


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def flags(root: Path, layout: str) -> list[str]:
    return World(root).flags(
        save=root / f"run-{layout}", domain_teacher_load=root / "domain-teacher", micro_batch_size=None,
        global_batch_size=4, max_prompt_length=40, max_response_length=70, max_tokens_per_microbatch=BUDGET,
        rollout_temperature=TEMPERATURE, importance_correction="none", clip_grad=1e9, **LAYOUTS[layout][1],
    )  # fmt: skip


def rank_main(line: list[str]) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from megatron_camopd.model.passes import accumulate_gradients, score_responses
    from megatron_camopd.runtime.layout import Layout
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    found: dict[str, Any] = {"place": {"tp": parallel_state.get_tensor_model_parallel_rank()}}
    for name, lengths in LENGTHS.items():
        batch = ragged(lengths)
        shares = trainer.passes.shares(batch.rollout.lengths.tolist())
        own = torch.tensor(shares[Layout.current().data.rank])
        scores = score_responses(trainer.passes, trainer.model, batch.rollout.take(own))
        found[name] = {"rows": own, "scores": scores}
        for case in CASES:
            trainer.clear_gradients()
            done = accumulate_gradients(trainer.passes, trainer.model, batch, coefficients(batch, case).float())
            model = unwrap_model(trainer.model[0])
            gradients = {key: parameter.main_grad.clone() for key, parameter in model.named_parameters()}
            found[name][case] = {
                "loss": done.loss, "balance": done.balance, "gradients": named_by_table(model, gradients),
            }  # fmt: skip
    return found


@functools.cache
def run(parent: Path, layout: str) -> list[dict[str, Any]]:
    return run_ranks(rank_main, LAYOUTS[layout][0], flags(world_root(parent, MODEL), layout))


@functools.cache
def reference(parent: Path, name: str, case: str) -> dict[str, Any]:
    batch = ragged(LENGTHS[name])
    logprobs, network = reference_logprobs(world_root(parent, MODEL) / "student-hf", batch.rollout, TEMPERATURE)
    advantage = batch.teacher_logprobs.double() - logprobs.detach()
    terms = coefficients(batch, case) * advantage * logprobs
    (-terms.sum()).backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    size = float(terms.detach().abs().sum())
    return {"scores": logprobs.detach(), "loss": -float(terms.detach().sum()), "size": size, "gradients": gradients}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("layout", NAMES)
def test_scores(parent: Path, layout: str, name: str) -> None:
    expected = reference(parent, name, "all")["scores"]
    seen: set[int] = set()
    for rank in run(parent, layout):
        rows = rank[name]["rows"]
        torch.testing.assert_close(rank[name]["scores"].double(), expected[rows], rtol=0, atol=1e-5)
        seen.update(rows.tolist())
    assert seen == set(range(len(LENGTHS[name])))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("layout", NAMES)
def test_loss_and_gradients(parent: Path, layout: str, name: str, case: str) -> None:
    ranks, expected = run(parent, layout), reference(parent, name, case)
    for rank in ranks:
        assert rank[name][case]["loss"] == pytest.approx(expected["loss"], abs=1e-6 * expected["size"])
        if case == "one sample":  # all ranks but one have padding alone
            assert rank[name][case]["balance"] == (2 if "dp2" in layout else 1)
    gradients = join(parent, MODEL, ranks, lambda rank: rank[name][case]["gradients"])
    assert gradients.keys() == expected["gradients"].keys()
    for key, gradient in gradients.items():
        error = relative_error(gradient, expected["gradients"][key])
        assert error < 1e-5, f"gradient of {key} is off by {error:.1e}"
