"""The native engine on every parallel layout, held to full recomputation by Hugging Face and to the scoring pass.

Prompts of 1 to 14 tokens in batches of 3, so that a batch mixes lengths, several batches run, and rows leave while
others go on.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from megatron_camopd.batch import RolloutBatch
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_checkpoint, write_prompts

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}),
    "tp2-pp2-sp": (
        4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}  # fmt: skip
SIZES = {"vocab_size": 300, "num_hidden_layers": 4, "initializer_range": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False, "hidden_size": 40, "head_dim": 16, "num_attention_heads": 6},
}
# Each layout with one of the two, and each of the two with and without a pipeline.
CASES = [("tied", "tp1"), ("untied", "tp1"), ("untied", "tp2"), ("tied", "tp2-sp"), ("tied", "pp2"),
         ("untied", "pp2-uneven"), ("tied", "tp2-pp2-sp")]  # fmt: skip
TEMPERATURES = (0.7, 1.0)
RESPONSE = 10
LENGTHS = (5, 1, 9, 2, 14, 9, 3, 1)
INDICES = (4, 0, 7, 1, 3, 6, 2, 5)  # places in the global batch: any order


def prompts() -> list[list[int]]:
    """Token ids over the whole vocabulary."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def rank_main(line: list[str], end_ids: list[int]) -> dict[str, Any]:
    """Decode greedily and at each temperature, then score what was sampled."""
    from megatron_camopd.model.passes import PassSettings, score_responses
    from megatron_camopd.rollout import megatron_engine
    from megatron_camopd.rollout.megatron_engine import MegatronEngine
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))

    megatron_engine._CACHE_BLOCK = 3  # so that the cache of these short responses grows several times

    def decode(temperature: float, batch_size: int = 3, step: int = 7) -> RolloutBatch:
        engine = MegatronEngine(
            trainer.model[0],
            seed=1234,
            temperature=temperature,
            end_of_sequence_ids=end_ids,
            max_response_length=RESPONSE,
            vocab_size=args.vocab_size,
            batch_size=batch_size,
        )
        return engine.generate(prompts(), torch.tensor(INDICES), step=step)

    result: dict[str, Any] = {"greedy": vars(decode(0.0))}
    for temperature in TEMPERATURES:
        rollout = decode(temperature)
        args.rollout_temperature = temperature
        scored = score_responses(PassSettings.of(args), trainer.model, rollout)
        result[f"sampled {temperature}"] = vars(rollout) | {"scored": scored}
    result["one batch"] = vars(decode(1.0, batch_size=64))
    result["next step"] = vars(decode(1.0, step=8))
    return result


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoding")


@functools.cache
def world(parent: Path, model: str) -> World:
    made = World(parent / model)
    made.root.mkdir()
    make_checkpoint(made.student, seed=4, **(SIZES | MODELS[model]))
    write_prompts(made.general, "general")
    return made


@functools.cache
def greedy_reference(parent: Path, model: str) -> tuple[list[list[int]], list[Tensor], list[int]]:
    """Continuations and log-probabilities by full recomputation, nothing cached; and two ids that end some of them."""
    network = Qwen3ForCausalLM.from_pretrained(world(parent, model).root / "student-hf", attn_implementation="eager")
    responses, logprobs = [], []
    with torch.no_grad():
        for prompt in prompts():
            tokens, chosen = list(prompt), []
            for _ in range(RESPONSE):
                distribution = torch.log_softmax(network(torch.tensor([tokens])).logits[0, -1].double(), dim=-1)
                tokens.append(int(distribution.argmax()))
                chosen.append(distribution.max())
            responses.append(tokens[len(prompt) :])
            logprobs.append(torch.stack(chosen))
    # The first row ends with its first token; the fourth later, with an id that the first row does not end with.
    first = responses[0][0]
    second = next(token for token in responses[3][3:] if token not in responses[3][:3] and token != first)
    for row, response in enumerate(responses):
        ends = [place for place, token in enumerate(response) if token in (first, second)]
        keep = ends[0] + 1 if ends else RESPONSE
        responses[row], logprobs[row] = response[:keep], logprobs[row][:keep]
    return responses, logprobs, [first, second]


@functools.cache
def run_layout(parent: Path, model: str, layout: str) -> list[dict[str, Any]]:
    """All ranks' results of one case; each runs once."""
    made = world(parent, model)
    ranks, flags = LAYOUTS[layout]
    line = made.flags(
        save=made.root / f"run-{layout}",
        general_teacher_load=made.student,
        domain_prompts=None,
        preservation_steps=0,
        global_batch_size=8,
        micro_batch_size=2,
        **flags,
    )
    return run_ranks(rank_main, ranks, line, greedy_reference(parent, model)[2])


def responses_of(rollout: dict[str, Tensor]) -> list[list[int]]:
    rows = zip(rollout["tokens"], rollout["prompt_lengths"].tolist(), rollout["response_lengths"].tolist(), strict=True)
    return [tokens[prompt : prompt + length].tolist() for tokens, prompt, length in rows]


each_case = pytest.mark.parametrize(("model", "layout"), CASES)


@each_case
def test_greedy_tokens_are_those_of_full_recomputation(parent: Path, model: str, layout: str) -> None:
    expected, logprobs, end_ids = greedy_reference(parent, model)
    lengths = [len(response) for response in expected]
    assert len(set(lengths)) >= 3 and lengths[0] == 1 and max(lengths) == RESPONSE  # the case is worth its name
    assert {response[-1] for response in expected} >= set(end_ids)
    for rank in run_layout(parent, model, layout):
        rollout = rank["greedy"]
        assert rollout["indices"].tolist() == list(INDICES)
        assert rollout["prompt_lengths"].tolist() == list(LENGTHS)
        for row, prompt in enumerate(prompts()):
            assert rollout["tokens"][row, : len(prompt)].tolist() == prompt
        assert responses_of(rollout) == expected
        cut = [response[-1] not in end_ids for response in expected]
        assert any(cut) and not all(cut)
        assert rollout["truncated"].tolist() == cut
        for row, values in enumerate(logprobs):
            found = rollout["rollout_logprobs"][row, : len(values)].double()
            torch.testing.assert_close(found, values, rtol=0, atol=1e-4)
            assert not rollout["rollout_logprobs"][row, len(values) :].any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@each_case
def test_logprobs_are_those_of_the_scoring_pass(parent: Path, model: str, layout: str, temperature: float) -> None:
    for rank in run_layout(parent, model, layout):
        rollout = rank[f"sampled {temperature}"]
        torch.testing.assert_close(rollout["rollout_logprobs"], rollout["scored"], rtol=0, atol=1e-4)
        assert rollout["scored"].lt(-0.01).any(dim=1).all()


@pytest.mark.parametrize("draw", [*(f"sampled {temperature}" for temperature in TEMPERATURES), "next step"])
@each_case
def test_samples_do_not_depend_on_the_layout(parent: Path, model: str, layout: str, draw: str) -> None:
    alone = run_layout(parent, model, "tp1")[0][draw]
    for rank in run_layout(parent, model, layout):
        for name in ("indices", "prompt_lengths", "response_lengths", "truncated"):
            assert torch.equal(rank[draw][name], alone[name]), name
        assert responses_of(rank[draw]) == responses_of(alone)


@pytest.mark.parametrize("model", MODELS)
def test_samples_depend_on_step_and_row_alone(parent: Path, model: str) -> None:
    """Not on the batch that a row was decoded in; and another step draws anew."""
    result = run_layout(parent, model, "tp1")[0]
    sampled = responses_of(result["sampled 1.0"])
    assert responses_of(result["one batch"]) == sampled
    assert responses_of(result["next step"]) != sampled
    assert len({tuple(response) for response in sampled}) == len(sampled)
    assert max(map(len, sampled)) == RESPONSE and result["sampled 1.0"]["truncated"].any()
