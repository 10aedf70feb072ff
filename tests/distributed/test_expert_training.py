"""Scores, loss and gradients of models with experts, packed, against Hugging Face's model in float64.

The sequences are scored and trained one at a time there. Expert parallelism is refused; the layouts are those of runs.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.batch import ScoredBatch
from tests.support.expert_models import TRAINED, float64_model, named_gradients
from tests.support.layouts import relative_error
from tests.support.processes import run_ranks
from tests.support.ragged import LENGTHS, coefficients, ragged
from tests.support.worlds import World, make_checkpoint, write_prompts

MODELS = {
    "top 2": TRAINED,
    "top 4, mixed": TRAINED | {"num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 2},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@functools.cache
def world(parent: Path, model: str) -> World:
    found = World(parent / model.replace(" ", "-"))
    found.root.mkdir()
    make_checkpoint(found.student, seed=1, **MODELS[model])
    for path in (found.general, found.domain):
        write_prompts(path, path.stem)
    return found


def batch() -> ScoredBatch:
    return ragged(LENGTHS["far apart"])


def rank_main(line: list[str]) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from megatron.core.utils import unwrap_model

    from megatron_camopd.checkpoint.assets import assets_dir, read_model
    from megatron_camopd.model.passes import accumulate_gradients, score_responses
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    scores = score_responses(trainer.passes, trainer.model, batch().rollout)
    trainer.clear_gradients()
    done = accumulate_gradients(trainer.passes, trainer.model, batch(), coefficients(batch(), "all").float())
    family, arch = read_model(assets_dir(args.load))
    model, shards = unwrap_model(trainer.model[0]), []
    for name, parameter in model.named_parameters():
        first = get_transformer_layer_offset(model.config)
        entry, index = family.table.find_module_parameter(name, arch, first_layer=first)
        shards.append((entry.key, index, parameter.main_grad.clone()))
    record = trainer.train_step()
    return {"scores": scores, "loss": done.loss, "shards": shards, "skipped": record["skipped"],
            "tp": parallel_state.get_tensor_model_parallel_rank()}  # fmt: skip


def joined(parent: Path, model: str, ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients by Hugging Face name from the shards of all ranks; copies must be equal."""
    from megatron_camopd.checkpoint.assets import assets_dir, read_model

    family, arch = read_model(assets_dir(world(parent, model).student))
    shards: dict[Any, dict[int, Tensor]] = {}
    for rank in ranks:
        for key, index, tensor in rank["shards"]:
            assert torch.equal(shards.setdefault((key, index), {}).setdefault(rank["tp"], tensor), tensor), key
    found: dict[str, Tensor] = {}
    for entry, index in family.table.model_tensors(arch):
        parts = shards.pop((entry.key, index))
        parts_of_hf = entry.to_hf(entry.tp_join([parts[rank] for rank in sorted(parts)]), arch)
        found |= dict(zip(entry.hf_names(index), parts_of_hf, strict=True))
    assert not shards
    return found


@functools.cache
def run(parent: Path, model: str, layout: str) -> list[dict[str, Any]]:
    ranks, changes = LAYOUTS[layout]
    found = world(parent, model)
    line = found.flags(
        save=found.root / layout, general_teacher_load=found.student, max_prompt_length=40, max_response_length=70,
        max_tokens_per_microbatch=150, rollout_temperature=0.7, importance_correction="none", clip_grad=1e9, **changes,
    )  # fmt: skip
    return run_ranks(rank_main, ranks, line)


@functools.cache
def reference(parent: Path, model: str) -> dict[str, Any]:
    folder = world(parent, model).student.with_name("student-hf")
    network = float64_model(folder)
    rollout, rows = batch().rollout, []
    for row, length in enumerate(rollout.lengths.tolist()):
        tokens, prompt = rollout.tokens[row, :length], int(rollout.prompt_lengths[row])
        logits = network(tokens[None]).logits[0, prompt - 1 : -1] / 0.7
        chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[prompt:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(chosen, (0, rollout.rollout_logprobs.shape[1] - len(chosen))))
    scores = torch.stack(rows)
    terms = coefficients(batch(), "all") * (batch().teacher_logprobs.double() - scores.detach()) * scores
    (-terms.sum()).backward()
    return {
        "scores": scores.detach(),
        "loss": -float(terms.detach().sum()),
        "size": float(terms.detach().abs().sum()),
        "gradients": named_gradients(network),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_scores_loss_and_gradients(parent: Path, model: str, layout: str) -> None:
    expected, ranks = reference(parent, model), run(parent, model, layout)
    for rank in ranks:
        torch.testing.assert_close(rank["scores"].double(), expected["scores"], rtol=0, atol=2e-5)
        assert rank["loss"] == pytest.approx(expected["loss"], abs=1e-6 * expected["size"])
        assert rank["skipped"] == 0  # of a whole step after it, rollouts included
    gradients = joined(parent, model, ranks)
    assert gradients.keys() == expected["gradients"].keys()
    for name, gradient in gradients.items():
        wanted = expected["gradients"][name]
        if not wanted.any():  # an expert that no token chose
            assert not gradient.any(), name
            continue
        error = relative_error(gradient, wanted)
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"
