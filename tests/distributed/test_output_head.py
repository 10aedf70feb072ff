"""The output head in Megatron's training pass: what reaches ``main_grad``, by which way, and with which head.

The head adds its weight's gradient to DDP's float32 buffer in the forward pass. That has to come out as if autograd had
delivered it and as if the logits had been there, on every layout, with reductions that overlap the backward pass, and
for a rank that trains on nothing. The reference is Hugging Face's Qwen3 in float64 with autograd, as in
``test_layouts``, whose tolerance of 1e-5 holds here too.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.objective.method import broadcast_to_tokens
from tests.support.layouts import (
    MODELS,
    TEMPERATURES,
    join,
    named_by_table,
    reference_logprobs,
    relative_error,
    world_root,
)
from tests.support.processes import run_ranks
from tests.support.worlds import World

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2 | {"sequence_parallel": True}),
    "pp2": (2, PP2 | {"overlap_grad_reduce": True}),
    "dp2": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True}),
}
# The head and where its weight's gradient goes: into main_grad at once (the default), or through autograd.
VARIANTS = ("fused", "fused, loss scale 1024", "fused, autograd", "materialized")
COEFFICIENTS = {
    "several": torch.tensor([0.05, 0.0, 0.1, 0.02, 0.2, 0.0, 0.07]),  # micro-batches of 2, 2 and 1
    "one": torch.tensor([0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0]),  # another data-parallel rank has a filler only
}
IMPORTANCE = ("mask", 0.5, 5.0)
TOKENS = 24  # of a micro-batch
PROMPTS, RESPONSES = (3, 9, 5, 4, 12, 7, 6), (6, 2, 9, 1, 5, 8, 4)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@functools.cache
def scored(parent: Path, model: str) -> tuple[ScoredBatch, Any]:
    """Random tokens, scored: the student in float64 by Hugging Face, the others nearby. And the student's network.

    The ranks read the batch from ``batch.pt``.
    """
    root, generator = world_root(parent, model), torch.Generator().manual_seed(5)
    rows, width = len(PROMPTS), max(RESPONSES)
    batch = RolloutBatch(
        indices=torch.arange(rows),
        tokens=torch.randint(300, (rows, max(map(sum, zip(PROMPTS, RESPONSES, strict=True)))), generator=generator),
        prompt_lengths=torch.tensor(PROMPTS),
        response_lengths=torch.tensor(RESPONSES),
        rollout_logprobs=torch.zeros(rows, width),
        truncated=torch.zeros(rows, dtype=torch.bool),
    )
    student, network = reference_logprobs(root / "student-hf", batch, TEMPERATURES[model])
    mask = batch.response_mask
    offsets = torch.randn(2, rows, width, generator=generator) * mask
    batch.rollout_logprobs.copy_(student.detach() + offsets[0])
    teacher = (student.detach() + offsets[1]).float()
    torch.save([vars(batch), teacher, student.detach().float()], root / "batch.pt")
    return ScoredBatch(batch, torch.zeros(len(batch), dtype=torch.int64), teacher, student.detach().float()), (
        student,
        network,
    )


def expected_gradients(parent: Path, model: str, coefficients: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by Hugging Face name, float64, of Eq. 9 of the paper spelled out."""
    batch, (student, network) = scored(parent, model)
    frozen = student.detach()
    ratio = (frozen - batch.rollout.rollout_logprobs.double()).exp()
    weight = torch.where((ratio >= IMPORTANCE[1]) & (ratio <= IMPORTANCE[2]), ratio, 0.0)
    kept = int((weight.bool() & batch.response_mask)[coefficients > 0].sum())
    assert kept > 0, "nothing would be trained"
    terms = coefficients[:, None].double() * weight * (batch.teacher_logprobs.double() - frozen) * student
    loss = -(terms * batch.response_mask).sum()
    names = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True)
    return float(loss.detach()), dict(zip(names, gradients, strict=True))


def flags(root: Path, model: str, name: str, **changes: Any) -> list[str]:
    settings = {"micro_batch_size": 2, "global_batch_size": 4, "rollout_temperature": TEMPERATURES[model]}
    return World(root).flags(save=root / f"run-{name}", **(settings | changes))


# What runs on each rank -------------------------------------------------------------------------------------------


def rank_main(line: list[str], batch_file: str) -> dict[str, Any]:
    """Scores, losses and main gradients of every variant; how the parameters and the state dict are left."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.utils import get_model_config, unwrap_model

    from megatron_camopd.model import output_head
    from megatron_camopd.model.builder import HEADS
    from megatron_camopd.model.passes import PassSettings, score_responses
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    model = unwrap_model(trainer.model[0])
    fields, teacher, student = torch.load(batch_file)
    rollout = RolloutBatch(**fields)
    batch = ScoredBatch(rollout, torch.zeros(len(rollout), dtype=torch.int64), teacher, student)
    find_buffer = output_head.float32_main_grad
    results: dict[str, Any] = {"place": {"tp": parallel_state.get_tensor_model_parallel_rank()}, "passes": {}}
    for variant in VARIANTS:
        if model.post_process:
            assert type(model.output_layer) in HEADS.values()
            model.output_layer.__class__ = HEADS[variant.split(",")[0]]
        output_head.float32_main_grad = (lambda weight: None) if "autograd" in variant else find_buffer
        scale = torch.tensor([1024.0 if "1024" in variant else 1.0])
        get_model_config(trainer.model[0]).grad_scale_func = lambda loss, scale=scale: scale * loss
        passes: dict[str, Any] = {
            "scores": score_responses(packed(PassSettings.of(args), TOKENS), trainer.model, batch.rollout)
        }
        for name in (*COEFFICIENTS, *COEFFICIENTS):  # reductions begin to overlap in the second pass
            passes[name] = one_pass(args, trainer, model, batch, COEFFICIENTS[name])
            passes[name]["gradients"] = [(*key, grad / scale) for *key, grad in passes[name]["gradients"]]
        results["passes"][variant] = passes
    if model.post_process:
        keys = []
        for head in (ColumnParallelLinear, *HEADS.values()):
            model.output_layer.__class__ = head
            keys.append([list(model.state_dict()), list(model.sharded_state_dict())])
        results["state_dict_keys"] = keys
    return results


def one_pass(args: Any, trainer: Any, model: Any, batch: ScoredBatch, coefficients: Tensor) -> dict[str, Any]:
    """Loss, gradients by table entry, whether any ``grad`` is left, and the weight's flag after the pass and reset."""
    from megatron_camopd.model.passes import PassSettings, accumulate_gradients

    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    weight = head_weight(model) if model.post_process else None
    reset = weight is not None and weight.grad_added_to_main_grad
    loss = accumulate_gradients(
        packed(PassSettings.of(args), TOKENS),
        trainer.model,
        batch,
        broadcast_to_tokens(coefficients, batch.response_mask),
    ).loss
    if args.use_distributed_optimizer:
        gather_reduced_shards(trainer.model[0])
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    return {
        "loss": loss,
        "gradients": named_by_table(model, gradients),
        "grads_left": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "flags": [reset, weight is not None and weight.grad_added_to_main_grad],
        "zero_out_wgrad": getattr(weight, "zero_out_wgrad", False),
    }


def head_weight(model: Any) -> Any:
    own = model.output_layer.weight  # None where the embedding of the same stage is its weight
    return own if own is not None else model.shared_embedding_or_output_weight()


def gather_reduced_shards(ddp: Any) -> None:
    """The distributed optimizer reduces to each rank its part of a bucket: put the parts together on every rank."""
    import torch.distributed as dist

    group = ddp.dp_group
    for bucket in (bucket for buffer in ddp.buffers for bucket in buffer.buckets):
        parts = list(bucket.grad_data.chunk(dist.get_world_size(group)))
        dist.all_gather(parts, parts[dist.get_rank(group)].clone(), group=group)


@functools.cache
def run_layout(parent: Path, model: str, layout: str) -> list[dict[str, Any]]:
    """All ranks' results; each layout runs once."""
    scored(parent, model)
    root, (ranks, changes) = world_root(parent, model), LAYOUTS[layout]
    return run_ranks(rank_main, ranks, flags(root, model, layout, **changes), str(root / "batch.pt"))


# The tests --------------------------------------------------------------------------------------------------------

each_model = pytest.mark.parametrize("model", MODELS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
@each_model
def test_gradients_are_those_of_the_formula(parent: Path, model: str, layout: str) -> None:
    ranks = run_layout(parent, model, layout)
    for name, coefficients in COEFFICIENTS.items():
        loss, expected = expected_gradients(parent, model, coefficients)
        for variant in VARIANTS:
            for rank in ranks:
                assert rank["passes"][variant][name]["loss"] == pytest.approx(loss, rel=2e-5), variant
            found = join(parent, model, ranks, lambda rank: rank["passes"][variant][name]["gradients"])  # noqa: B023
            assert found.keys() == expected.keys()
            for key, gradient in found.items():
                error = relative_error(gradient, expected[key])
                assert error < 1e-5, f"{variant}, {name}: gradient of {key} is off by {error:.1e}"


@each_layout
@each_model
def test_variants_differ_by_rounding_alone(parent: Path, model: str, layout: str) -> None:
    """A loss scale that is a power of two does not even change a bit."""
    for rank in run_layout(parent, model, layout):
        plain = rank["passes"]["fused"]
        for variant in VARIANTS:
            other = rank["passes"][variant]
            torch.testing.assert_close(other["scores"], plain["scores"], rtol=1e-5, atol=1e-5)
            for name in COEFFICIENTS:
                pairs = zip(other[name]["gradients"], plain[name]["gradients"], strict=True)
                for (key, layer, gradient), (*place, expected) in pairs:
                    assert [key, layer] == place
                    if "1024" in variant:
                        assert torch.equal(gradient, expected), (variant, name, key)
                    else:
                        assert relative_error(gradient, expected) < 1e-5, (variant, name, key)


@each_layout
@each_model
def test_ddp_is_left_as_its_own_layers_leave_it(parent: Path, model: str, layout: str) -> None:
    """No gradient remains in ``grad``; the flag is up only where the head's gradient alone reached the parameter."""
    last = run_layout(parent, model, layout)[-1]
    shared = model == "tied" and layout != "pp2"
    for variant in VARIANTS:
        in_place = variant.startswith("fused") and "autograd" not in variant
        for name in COEFFICIENTS:
            found = last["passes"][variant][name]
            assert found["grads_left"] == []
            assert found["zero_out_wgrad"] == shared
            assert found["flags"] == [False, in_place and not shared], (variant, name)
    plain, *heads = last["state_dict_keys"]
    assert all(keys == plain for keys in heads) and len(heads) == 2 and len(plain[0]) > 20


def test_bfloat16_sums_in_float32(parent: Path) -> None:
    """The weight's gradient over several microbatches of bf16 hidden states: autograd rounds each, main_grad none."""
    scored(parent, "untied")
    root = world_root(parent, "untied")
    line = flags(root, "untied", "bf16", bf16=True)
    (errors,) = run_ranks(bfloat16_main, 1, line, str(root / "batch.pt"))
    assert errors["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert errors["fused"] < errors["autograd"] < 1e-2
    assert errors["bf16 buffer"] < 1e-2


def packed(passes: Any, tokens: int) -> Any:
    """The settings with micro-batches of fewer tokens than a run allows."""
    return dataclasses.replace(passes, packing=dataclasses.replace(passes.packing, max_tokens=tokens))


def bfloat16_main(line: list[str], batch_file: str) -> dict[str, Any]:
    """Errors of main_grad against float64 from the very hidden states that the head was given."""
    from megatron.core.utils import unwrap_model

    from megatron_camopd.model import output_head
    from megatron_camopd.model.passes import PassSettings, accumulate_gradients
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    model = unwrap_model(trainer.model[0])
    fields, teacher, student = torch.load(batch_file)
    rollout = RolloutBatch(**fields)
    batch = ScoredBatch(rollout, torch.zeros(len(rollout), dtype=torch.int64), teacher, student)
    weight = model.output_layer.weight
    given: list[tuple[Tensor, Any]] = []
    model.output_layer.register_forward_pre_hook(
        lambda module, inputs, options: given.append((inputs[0].detach().clone(), options["request"])), with_kwargs=True
    )
    results: dict[str, Any] = {"dtypes": [str(weight.dtype), str(weight.main_grad.dtype)]}
    find_buffer, buffer = output_head.float32_main_grad, weight.main_grad
    for variant in ("fused", "autograd", "bf16 buffer"):
        output_head.float32_main_grad = (lambda weight: None) if variant == "autograd" else find_buffer
        weight.main_grad = torch.zeros_like(buffer, dtype=torch.bfloat16) if variant == "bf16 buffer" else buffer
        trainer.model[0].zero_grad_buffer()
        given.clear()
        accumulate_gradients(
            packed(PassSettings.of(args), 11),  # no two of the samples fit into one micro-batch
            trainer.model,
            batch,
            broadcast_to_tokens(COEFFICIENTS["several"], batch.response_mask),
        )
        results[variant] = relative_error(weight.main_grad, reference_weight_gradient(weight, given))
        assert len(given) == 5
    return results


def reference_weight_gradient(weight: Tensor, given: list[tuple[Tensor, Any]]) -> Tensor:
    """D (sum of losses x their loss gradient) / d weight in float64 by autograd; phantom rows included."""
    exact = weight.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for hidden, request in given:
        rows = hidden.double().transpose(0, 1).flatten(0, 1)[request.positions]
        logits = (rows @ exact.t())[:, : request.valid_vocab_size] / request.temperature
        logprob = torch.log_softmax(logits, dim=1).gather(1, request.targets[:, None]).squeeze(1)
        frozen = logprob.detach()
        ratio = (frozen - request.rollout_logprobs.double()).exp()
        ratio = torch.where((ratio >= IMPORTANCE[1]) & (ratio <= IMPORTANCE[2]), ratio, 0.0)
        gap = request.teacher_logprobs.double() - frozen
        total = total - float(request.loss_gradient) * (request.coefficients.double() * ratio * gap * logprob).sum()
    (gradient,) = torch.autograd.grad(total, exact)
    return gradient
