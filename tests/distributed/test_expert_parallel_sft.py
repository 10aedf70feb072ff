"""One step of fine-tuning a model with experts on layouts with expert parallelism, against Hugging Face in float64."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.expert_models import float64_model, named_gradients
from tests.support.expert_runs import LAYOUTS, world
from tests.support.processes import run_ranks

ROW, RATE = 120, 1.0
CLIP = 0.3
EPSILON = 1.0  # so large that Adam's first step is a smooth function of the gradient


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expert-parallel")


def rank_main(line: list[str]) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from megatron.core.utils import unwrap_model

    from megatron_camopd.checkpoint.assets import assets_dir, read_model
    from megatron_camopd.runtime.layout import Layout
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.sft.plan import plan_sft
    from megatron_camopd.stages.sft.runner import SftRunner

    args = parse_arguments(line)
    trainer = SftRunner(args, plan_sft(args))
    batch = trainer.plan.stream.next_batch(args.global_batch_size)
    record = trainer.update(batch)
    family, arch = read_model(assets_dir(args.load))
    model, shards, expert = unwrap_model(trainer.model[0]), [], Layout.current().expert
    for name, parameter in model.named_parameters():
        first = get_transformer_layer_offset(model.config)
        entry, index = family.table.find_module_parameter(name, arch, first_layer=first)
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        if "expert" in entry.axes:
            index = (index[0], index[1] + expert.rank * arch.num_experts // expert.size)
            tensor_rank = parallel_state.get_expert_tensor_parallel_rank()
        shards.append((entry.key, index, tensor_rank, parameter.detach().clone()))
    rows = [(one.token_ids, one.trained) for row in batch.rows for one in row]
    return {"record": record, "shards": shards, "rows": rows}


@functools.cache
def run(parent: Path, layout: str) -> list[dict[str, Any]]:
    ranks, changes = LAYOUTS[layout]
    found = world(parent)
    line = found.flags(
        stage="sft", save=found.root / layout.replace(" ", "-"), general_teacher_load=None, general_prompts=None,
        domain_prompts=None, max_prompt_length=None, max_response_length=None, seq_length=ROW, global_batch_size=4,
        conversations=found.root / "rows.jsonl", weight_decay=0.0, lr=RATE, adam_eps=EPSILON, clip_grad=CLIP, **changes,
    )  # fmt: skip
    return run_ranks(rank_main, ranks, line)


@functools.cache
def reference(parent: Path) -> dict[str, Any]:
    network = float64_model(world(parent).student.with_name("student-hf"))
    terms = []
    for token_ids, trained in run(parent, "one")[0]["rows"]:
        tokens = torch.tensor(token_ids)
        logprobs = torch.log_softmax(network(tokens[None]).logits[0, :-1], dim=-1)
        terms.append(-logprobs.gather(1, tokens[1:, None]).squeeze(1)[torch.tensor(trained[1:])])
    loss = torch.cat(terms).mean()
    loss.backward()
    gradients = named_gradients(network)
    norm = torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm()
    return {"loss": float(loss.detach()), "gradients": gradients, "norm": float(norm)}


def weights(parent: Path, ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Weights by Hugging Face name from the shards of all ranks; copies must be equal."""
    from megatron_camopd.checkpoint.assets import assets_dir, read_model

    family, arch = read_model(assets_dir(world(parent).student))
    shards: dict[Any, dict[int, Tensor]] = {}
    for rank in ranks:
        for key, index, place, tensor in rank["shards"]:
            assert torch.equal(shards.setdefault((key, index), {}).setdefault(place, tensor), tensor), (key, index)
    found: dict[str, Tensor] = {}
    for entry, index in family.table.model_tensors(arch):
        parts = shards.pop((entry.key, index))
        whole = entry.to_hf(entry.tp_join([parts[rank] for rank in sorted(parts)]), arch)
        found |= dict(zip(entry.hf_names(index), whole, strict=True))
    assert not shards
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step(parent: Path, layout: str) -> None:
    from safetensors.torch import load_file

    ranks, expected = run(parent, layout), reference(parent)
    for rank in ranks:
        assert rank["rows"] == ranks[0]["rows"] == run(parent, "one")[0]["rows"]
        assert rank["record"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert rank["record"]["grad_norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert expected["norm"] > 3 * CLIP
    before = load_file(world(parent).student.with_name("student-hf") / "model.safetensors")
    after = weights(parent, ranks)
    assert after.keys() == before.keys() == expected["gradients"].keys()
    for name, weight in after.items():
        gradient = expected["gradients"][name] * CLIP / expected["norm"]
        change = -RATE * gradient / (gradient.abs() + EPSILON)
        error = (weight.double() - before[name].double() - change).norm()
        assert error < 1e-5 * change.norm() + 1e-7 * weight.double().norm(), name  # the latter: rounding of the sum
