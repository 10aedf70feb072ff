"""One training step on every parallel layout, and the float64 reference that it is compared with."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.checkpoint.assets import assets_dir, read_config
from megatron_camopd.families.placement import Index
from megatron_camopd.families.qwen3 import FAMILY
from megatron_camopd.objective.method import TrainingWeights, broadcast_to_tokens
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_checkpoint

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}),
    "dp2": (2, {}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2-pp2-sp": (
        4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp4": (4, {"context_parallel_size": 4}),
    "cp2-dp2": (4, {"context_parallel_size": 2}),
    "cp2-pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "cp2-tp2-sp": (
        4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}  # fmt: skip


# 300 ids: at TP2 they are cut into 256 and 44, with phantom columns behind.
SIZES = {"vocab_size": 300, "num_hidden_layers": 4, "initializer_range": 0.2}


MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False, "hidden_size": 40, "head_dim": 16, "num_attention_heads": 6},
}


TEMPERATURES = {"tied": 1.0, "untied": 0.7}


SCALES = {"general": 2.0, "domain": 1.5}


CLIP = {"tied": 0.05, "untied": 1e9}


LEARNING_RATE = 0.5


# name of the step: its branch's place in the schedule, the mass target
STEPS = {"general": (0, 0.8), "domain": (1, 0.6), "one sample": (0, 1e-6)}


# On the rollouts of "one sample": the shortest is trained, and data-parallel ranks without a sample run padding.
SHORTEST = "shortest sample"


RESPONSE = 9


END_IDS = [2, *range(40, 300, 25)]  # so many that some rows end early


@functools.cache
def world_root(parent: Path, model: str) -> Path:
    """Checkpoints of student and two teachers, and prompts of 12 to 36 tokens, below ``parent``."""
    world = World(parent / model)
    world.root.mkdir()
    for seed, name in enumerate(("student", "teacher", "domain-teacher")):
        make_checkpoint(world.root / name, seed=seed, **(SIZES | MODELS[model]))
        generation = {"eos_token_id": END_IDS}
        (assets_dir(world.root / name) / "generation_config.json").write_text(json.dumps(generation))
    for branch, path in (("g", world.general), ("d", world.domain)):
        texts = [branch * (1 + 5 * row % 11) + str(row) for row in range(40)]
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return world.root


def flags(root: Path, model: str, layout: str) -> list[str]:
    return World(root).flags(
        save=root / f"run-{layout}",
        domain_teacher_load=root / "domain-teacher",
        recovery_steps=1,
        general_feedback_scale=SCALES["general"],
        domain_feedback_scale=SCALES["domain"],
        global_batch_size=8,
        micro_batch_size=2,
        rollout_batch_size=3,
        max_response_length=RESPONSE,
        rollout_temperature=TEMPERATURES[model],
        optimizer="sgd",
        sgd_momentum=0.0,
        weight_decay=0.0,
        lr=LEARNING_RATE,
        clip_grad=CLIP[model],
        **LAYOUTS[layout][1],
    )


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
    seen = watch_sequence_parallelism(model)
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = {}
    for name, (number, mass_target) in STEPS.items():
        for key, parameter in model.named_parameters():
            parameter.data.copy_(initial[key])
        trainer.step = number
        branches = [dataclasses.replace(branch, mass_target=mass_target) for branch in trainer.plan.table.branches]
        trainer.method = METHODS[args.distill_method].build(args, branches)
        batch, steps[name] = watched_step(trainer)
    for key, parameter in model.named_parameters():
        parameter.data.copy_(initial[key])
    steps[SHORTEST] = steps["one sample"] | update_on_shortest(trainer, batch)
    return {
        "steps": steps,
        "initial": named_by_table(model, initial),
        "seen": seen,
        "place": {
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "dp": parallel_state.get_data_parallel_rank(),
        },
    }


def watched_step(trainer: Any) -> tuple[ScoredBatch, dict[str, Any]]:
    """One ``train_step``: the scored global batch; its tensors, record, selection, gradients and weights afterwards."""
    caught: dict[str, Any] = {}
    generate, update = trainer.engine.generate, trainer.update

    def generate_elsewhere(*arguments: Any, **options: Any) -> RolloutBatch:
        """Change the batch as if another engine had sampled: importance weights inside and outside of the limits."""
        rollout = generate(*arguments, **options)
        columns = torch.arange(rollout.rollout_logprobs.shape[1])
        offsets = torch.tensor([0.0, 0.3, -0.4, 1.2, -2.0])[(rollout.indices[:, None] * 3 + columns + 2) % 5]
        offsets = offsets * rollout.response_mask
        return dataclasses.replace(rollout, rollout_logprobs=rollout.rollout_logprobs + offsets)

    def watched_update(batch: ScoredBatch, weights: TrainingWeights) -> Any:
        caught.update(batch=batch, selected=weights.selected, coefficients=weights.coefficients)
        caught.update(batch.token_values(), rollout=vars(batch.rollout))
        return update(batch, weights)

    trainer.engine.generate, trainer.update = generate_elsewhere, watched_update
    try:
        record = trainer.train_step()
    finally:
        trainer.engine.generate, trainer.update = generate, update
    return caught.pop("batch"), caught | {"record": record} | gradients_and_weights(trainer)


def update_on_shortest(trainer: Any, batch: ScoredBatch) -> dict[str, Any]:
    """The end of a step in which the shortest sample was the one selected.

    Its few tokens may have a gap near zero, of which float32 has few digits: the teacher is moved by a nat.
    """
    batch = dataclasses.replace(batch, teacher_logprobs=batch.teacher_logprobs + 1.0)
    selected = shortest(batch.rollout)
    of_samples = torch.where(selected, SCALES["general"] / batch.rollout.response_lengths.double(), 0.0)
    coefficients = broadcast_to_tokens(of_samples, batch.response_mask)
    record = trainer.update(batch, TrainingWeights(coefficients, selected)) | {"selected_fraction": 1 / len(batch)}
    changed = {"selected": selected, "coefficients": coefficients, "record": record}
    return changed | gradients_and_weights(trainer)


def shortest(rollout: RolloutBatch) -> Tensor:
    lengths = rollout.prompt_lengths + rollout.response_lengths
    return torch.arange(len(rollout)) == lengths.argmin()


def gradients_and_weights(trainer: Any) -> dict[str, Any]:
    from megatron.core.utils import unwrap_model

    model = unwrap_model(trainer.model[0])
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"gradients": named_by_table(model, gradients), "weights": named_by_table(model, weights)}


def named_by_table(model: Any, tensors: dict[str, Tensor]) -> list[tuple[str, Index, Tensor]]:
    """(canonical key, index in the whole model, this rank's tensor)."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    offset = get_transformer_layer_offset(model.config)
    rows = []
    for name, tensor in tensors.items():
        entry, index = FAMILY.table.find_module_parameter(name)
        rows.append((entry.key, tuple(layer + offset for layer in index), tensor))
    return rows


def watch_sequence_parallelism(model: Any) -> list[tuple[bool, bool, bool, int]]:
    """Fills a list with (decoding, SP in the config, SP in every linear layer, length of the hidden states)."""
    seen: list[tuple[bool, bool, bool, int]] = []
    layer = model.decoder.layers[0]
    linear = [module for module in model.modules() if type(module).__name__.endswith("ParallelLinear")]
    layers = len(model.decoder.layers)
    assert len(linear) >= 4 * layers, len(linear)

    def look(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        decoding = options.get("inference_context") is not None
        everywhere = {bool(module.sequence_parallel) for module in linear}
        assert len(everywhere) == 1, everywhere
        seen.append((decoding, model.config.sequence_parallel, everywhere.pop(), hidden.shape[0]))

    layer.register_forward_pre_hook(look, with_kwargs=True)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    marks = {parameter.sequence_parallel for parameter in norms}
    assert len(norms) >= 4 * layers and marks == {model.config.sequence_parallel}, marks
    return seen


@functools.cache
def run_layout(parent: Path, model: str, layout: str) -> list[dict[str, Any]]:
    """All ranks' results of one layout; each layout runs once."""
    return run_ranks(rank_main, LAYOUTS[layout][0], flags(world_root(parent, model), model, layout))


def reference_logprobs(folder: Path, rollout: RolloutBatch, temperature: float) -> tuple[Tensor, Qwen3ForCausalLM]:
    """Log-probabilities [N, R] float64 with graph, each sample on its own, and the model they hang on."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    rows = []
    for row in range(len(rollout)):
        prompt, response = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        tokens = rollout.tokens[row, : prompt + response]
        logits = model(tokens[None]).logits[0, prompt - 1 : -1] / temperature
        chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[prompt:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(chosen, (0, rollout.rollout_logprobs.shape[1] - response)))
    return torch.stack(rows), model


def reference_scores(gap: Tensor, rollout: RolloutBatch, branch: str) -> Tensor:
    """Eq. 4 and 5, sample by sample."""
    scores = []
    for row, length in enumerate(rollout.response_lengths.tolist()):
        tokens = gap[row, :length]
        scores.append((tokens.abs() if branch == "general" else tokens.clamp(min=0)).sum() / length)
    return torch.stack(scores)


def reference_selection(scores: Tensor, mass_target: float) -> Tensor:
    """Eq. 6, spelled out."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    mass = 0.0
    for index in sorted(range(len(scores)), key=lambda row: -float(scores[row])):
        chosen[index] = True
        mass += float(scores[index])
        if mass >= mass_target * float(scores.sum()):
            break
    return chosen


@functools.cache
def reference(parent: Path, model: str, step: str) -> dict[str, Any]:
    """Scores, selection, loss and gradients (by Hugging Face name) from the rollouts of the one-process layout."""
    root = world_root(parent, model)
    rollout = RolloutBatch(**run_layout(parent, model, "tp1")[0]["steps"][step]["rollout"])
    branch = "domain" if step == "domain" else "general"
    teacher_name = "teacher-hf" if branch == "general" else "domain-teacher-hf"
    with torch.no_grad():
        teacher, _ = reference_logprobs(root / teacher_name, rollout, TEMPERATURES[model])
    if step == SHORTEST:
        teacher = teacher + 1.0
    student, network = reference_logprobs(root / "student-hf", rollout, TEMPERATURES[model])
    advantage = teacher - student.detach()
    scores = reference_scores(advantage, rollout, branch)
    selected = shortest(rollout) if step == SHORTEST else reference_selection(scores, STEPS[step][1])
    ratio = (student.detach() - rollout.rollout_logprobs.double()).exp()
    weight = torch.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0.0)
    terms = SCALES[branch] * weight * advantage * student * rollout.response_mask / rollout.response_lengths[:, None]
    loss = -terms[selected].sum() / selected.sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {
        "teacher": teacher,
        "student": student.detach(),
        "scores": scores,
        "selected": selected,
        "dropped": int(((weight == 0) & rollout.response_mask).sum()),
        "loss": float(loss.detach()),
        "magnitude": float(terms[selected].detach().abs().sum() / selected.sum()),
        "gradients": gradients,
        "grad_norm": float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm()),
    }


def join(parent: Path, model: str, ranks: Sequence[dict[str, Any]], pick: Any) -> dict[str, Tensor]:
    """:func:`join_shards` for the student of this file's world."""
    return join_shards(world_root(parent, model) / "student", ranks, pick)


def join_shards(student: Path, ranks: Sequence[dict[str, Any]], pick: Any) -> dict[str, Tensor]:
    """Tensors by Hugging Face name from all ranks' shards; copies on other ranks must be equal bit for bit."""
    arch = FAMILY.read_architecture(read_config(assets_dir(student)))
    shards: dict[tuple[str, Index], dict[int, Tensor]] = {}
    for rank in ranks:
        for key, index, tensor in pick(rank):
            held = shards.setdefault((key, index), {}).setdefault(rank["place"]["tp"], tensor)
            assert torch.equal(held, tensor), f"data-parallel ranks hold different {key} at {index}"
    result: dict[str, Tensor] = {}
    for entry, index in FAMILY.table.model_tensors(arch):
        parts = shards.pop((entry.key, index))
        full = entry.tp_join([parts[rank] for rank in sorted(parts)])
        if entry.partition.dim is None:
            assert all(torch.equal(part, full) for part in parts.values()), f"{entry.key} differs between TP ranks"
        if entry.partition.name == "VOCAB":
            assert not full[arch.vocab_size :].any(), f"phantom rows of {entry.key} changed"
        result |= dict(zip(entry.hf_names(index), entry.to_hf(full, arch), strict=True))
    if arch.tied and shards:  # the last stage's own copy of the embedding
        parts = shards.pop(("output_layer.weight", ()))
        copy = torch.cat([parts[rank] for rank in sorted(parts)])[: arch.vocab_size]
        assert torch.equal(copy, result["model.embed_tokens.weight"]), "the stages' copies of the embedding differ"
    assert not shards, shards.keys()
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
