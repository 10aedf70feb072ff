"""Supervised fine-tuning on every parallel layout: packed rows give the loss and gradients of lone conversations.

The reference is Hugging Face's Qwen3 with autograd in float64, each conversation on its own: were a packed neighbour
visible, the loss of a user's token counted, or a shard's gradient missing, it would be off by far more than the 1e-5
that float32 is allowed (see ``test_layouts``).
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_camopd.data import PackedBatch
from tests.support.layouts import (
    LAYOUTS,
    MODELS,
    SIZES,
    gradients_and_weights,
    join_shards,
    relative_error,
)
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_checkpoint

ROW = 128  # tokens of a packed row; conversations have about 30 to 220
CHANGES = {"as it is": ("heard", "yes"), "masked": ("HEARD", "yes"), "trained": ("heard", "yet")}


def conversations(number: int, *, heard: str, answer: str) -> list[dict[str, Any]]:
    """``number``: conversations of one to six answers; every other one ends with a user's word, which nothing trains.

    ``heard`` is such a last word, ``answer`` part of an answer.
    """
    rows = []
    for row in range(number):
        messages = [{"role": "system", "content": "s" * (row % 3)}] if row % 4 == 1 else []
        for turn in range((1, 6, 1, 2, 1, 1)[row % 6]):
            messages.append({"role": "user", "content": f"q{row}" + "u" * (5 * row % 7)})
            messages.append({"role": "assistant", "content": f"{answer} {turn}" + "a" * (7 * row % 5)})
        if row % 2:
            messages.append({"role": "user", "content": heard})
        rows.append({"id": f"c{row}", "messages": messages})
    return rows


@functools.cache
def world_root(parent: Path, model: str) -> Path:
    root = parent / model
    root.mkdir()
    make_checkpoint(root / "student", seed=3, **(SIZES | MODELS[model]))
    for name, (heard, answer) in CHANGES.items():
        rows = conversations(40, heard=heard, answer=answer)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = conversations(7, heard="x", answer="no")
    (root / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return root


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


def flags(root: Path, layout: str) -> list[str]:
    return World(root).flags(
        stage="sft",
        save=root / f"run-{layout}",
        general_teacher_load=None,
        general_prompts=None,
        domain_prompts=None,
        max_prompt_length=None,
        max_response_length=None,
        conversations=root / "as it is.jsonl",
        validation_conversations=root / "validation.jsonl",
        seq_length=ROW,
        global_batch_size=8,
        micro_batch_size=2,
        optimizer="sgd",
        sgd_momentum=0.0,
        weight_decay=0.0,
        lr=0.1,
        clip_grad=1e9,
        **LAYOUTS[layout][1],
    )


# What runs on each rank -------------------------------------------------------------------------------------------


def rank_main(line: list[str]) -> dict[str, Any]:
    """A step on the first batch of each file of CHANGES, always from the checkpoint's weights; the validation loss."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.sft.plan import plan_sft
    from megatron_camopd.stages.sft.runner import SftRunner

    args = parse_arguments(line)
    trainer = SftRunner(args, plan_sft(args))
    model = unwrap_model(trainer.model[0])
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    held_out = trainer.plan.validation
    assert held_out is not None
    validation = trainer.validation_loss(held_out)
    steps = {}
    for name in CHANGES:
        for key, parameter in model.named_parameters():
            parameter.data.copy_(initial[key])
        args.conversations = [args.conversations[0].replace("as it is", name)]
        batch = plan_sft(args).stream.next_batch(args.global_batch_size)
        args.conversations = [args.conversations[0].replace(name, "as it is")]
        record = trainer.update(batch)
        rows = [[(one.id, one.token_ids, one.trained) for one in row] for row in batch.rows]
        steps[name] = {"record": record, "rows": rows, **gradients_and_weights(trainer)}
    for key, parameter in model.named_parameters():
        parameter.data.copy_(initial[key])
    half = batch.rows[: args.global_batch_size // 2]  # the other half is empty, as before a conversation that is split
    sparse = trainer.update(PackedBatch([row for full in half for row in (full, [])]))
    return {
        "steps": steps,
        "sparse": {
            "record": sparse,
            "rows": [[(one.id, one.token_ids, one.trained) for one in row] for row in half],
            **gradients_and_weights(trainer),
        },
        "validation": validation,
        "validation_rows": [[(one.id, one.token_ids, one.trained) for one in row]
                            for row in held_out.batch.rows],
        "place": {"tp": parallel_state.get_tensor_model_parallel_rank()},
    }  # fmt: skip


@functools.cache
def run_layout(parent: Path, model: str, layout: str) -> list[dict[str, Any]]:
    return run_ranks(rank_main, LAYOUTS[layout][0], flags(world_root(parent, model), layout))


# The reference ----------------------------------------------------------------------------------------------------


def reference_loss(network: Qwen3ForCausalLM, rows: list[list[tuple[str, list[int], list[bool]]]]) -> torch.Tensor:
    """Mean -log p of the trained tokens, each conversation on its own."""
    terms = []
    for _, token_ids, trained in (conversation for row in rows for conversation in row):
        tokens = torch.tensor(token_ids)
        logprobs = torch.log_softmax(network(tokens[None]).logits[0, :-1], dim=-1)
        chosen = logprobs.gather(1, tokens[1:, None]).squeeze(1)
        terms.append(-chosen[torch.tensor(trained[1:])])
    return torch.cat(terms).mean()


@functools.cache
def reference(parent: Path, model: str) -> dict[str, Any]:
    folder = world_root(parent, model) / "student-hf"
    network = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    alone = run_layout(parent, model, "tp1")[0]
    loss = reference_loss(network, alone["steps"]["as it is"]["rows"])
    loss.backward()
    with torch.no_grad():
        validation = reference_loss(network, alone["validation_rows"])
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = None
    sparse_loss = reference_loss(network, alone["sparse"]["rows"])
    sparse_loss.backward()
    return {
        "loss": float(loss.detach()),
        "gradients": gradients,
        "validation": float(validation),
        "sparse_loss": float(sparse_loss.detach()),
        "sparse_gradients": {name: parameter.grad for name, parameter in network.named_parameters()},
    }


# The tests --------------------------------------------------------------------------------------------------------

each_model = pytest.mark.parametrize("model", MODELS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_model
def test_the_batch_is_worth_comparing(parent: Path, model: str) -> None:
    rows = run_layout(parent, model, "tp1")[0]["steps"]["as it is"]["rows"]
    counts = [len(row) for row in rows]
    assert len(rows) == 8 and max(counts) >= 3 and sum(len(one[1]) for row in rows for one in row) > 0.7 * 8 * ROW
    cut = [one for row in rows for one in row if len(one[1]) == ROW]
    assert cut, "no conversation was cut at the row's length"
    shares = [sum(one[2]) / len(one[1]) for row in rows for one in row]
    assert 0.05 < min(shares) < max(shares) < 0.8


@each_layout
@each_model
def test_loss_and_gradients_are_those_of_lone_conversations(parent: Path, model: str, layout: str) -> None:
    ranks, expected = run_layout(parent, model, layout), reference(parent, model)
    for rank in ranks:
        step = rank["steps"]["as it is"]
        assert step["rows"] == ranks[0]["steps"]["as it is"]["rows"]
        assert step["record"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert step["record"]["skipped"] == 0
        assert rank["validation"] == pytest.approx(expected["validation"], rel=1e-6)
    gradients = join_gradients(parent, model, ranks, "as it is")
    assert gradients.keys() == expected["gradients"].keys()
    for name, gradient in gradients.items():
        error = relative_error(gradient, expected["gradients"][name])
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


@each_layout
@each_model
def test_empty_rows_add_nothing(parent: Path, model: str, layout: str) -> None:
    """Every other row is empty: with two data-parallel ranks, one of them has nothing to train."""
    ranks, expected = run_layout(parent, model, layout), reference(parent, model)
    for rank in ranks:
        assert rank["sparse"]["record"]["loss"] == pytest.approx(expected["sparse_loss"], rel=1e-6)
        assert rank["sparse"]["record"]["skipped"] == 0
    student = world_root(parent, model) / "student"
    gradients = join_shards(student, ranks, lambda rank: rank["sparse"]["gradients"])
    for name, gradient in gradients.items():
        error = relative_error(gradient, expected["sparse_gradients"][name])
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


@each_layout
@each_model
def test_a_masked_token_does_not_matter_and_a_trained_one_does(parent: Path, model: str, layout: str) -> None:
    """The masked ones are last in their conversations and lie in the middle of packed rows: nothing may see them."""
    ranks = run_layout(parent, model, layout)
    plain, masked, trained = (join_gradients(parent, model, ranks, name) for name in CHANGES)
    ids = {name: ranks[0]["steps"][name]["rows"] for name in CHANGES}
    assert ids["as it is"] != ids["masked"] != ids["trained"] != ids["as it is"]
    # The embedding of the masked token gets no gradient either way, so every gradient is the same bit for bit.
    assert [name for name in plain if not torch.equal(plain[name], masked[name])] == []
    assert [name for name in plain if torch.equal(plain[name], trained[name])] == []


def join_gradients(parent: Path, model: str, ranks: list[dict[str, Any]], step: str) -> dict[str, torch.Tensor]:
    student = world_root(parent, model) / "student"
    return join_shards(student, ranks, lambda rank: rank["steps"][step]["gradients"])
