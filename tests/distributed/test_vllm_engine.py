"""The vLLM engine in the trainer's processes, on the CPU: what it samples, and what it leaves of the process.

Two runs of two ranks each. ``replicas``: a tied model, data parallel 2, an engine on each rank, so that every rank's
prompts travel. ``split``: an untied model, tensor parallel 2 in training and in the one engine.
"""

import dataclasses
import functools
import gc
import json
import os
import random
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.errors import ConfigurationError, RolloutError
from megatron_camopd.rollout.exchange import assign_prompts
from megatron_camopd.rollout.vllm_engine import VllmEngine, VllmSettings
from megatron_camopd.rollout.vllm_process import import_vllm
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_checkpoint, write_prompts

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "replicas": ({"tie_word_embeddings": True}, {}, 1),
    "split": (
        {"tie_word_embeddings": False, "hidden_size": 40, "num_attention_heads": 6},
        {"tensor_model_parallel_size": 2},
        2,
    ),
}
# vLLM pads this vocabulary to 320 (two ranks: 384), and on the CPU has cache blocks of 128 tokens and heads from 32 on.
SIZES = {
    "vocab_size": 300, "num_hidden_layers": 3, "head_dim": 32, "initializer_range": 0.2, "max_position_embeddings": 256,
}  # fmt: skip
TEMPERATURES = (0.7, 1.0)
RESPONSE = 12
LENGTHS = (5, 1, 140, 9, 2, 150, 14, 3)
END_IDS = tuple(range(3, 300, 9))
each_run = pytest.mark.parametrize("run", RUNS)


class StoredWeights:
    """The tensors of a Hugging Face folder, times ``scale``."""

    def __init__(self, folder: Path) -> None:
        self.stored = load_file(folder / "model.safetensors")
        self.stored.setdefault("lm_head.weight", self.stored["model.embed_tokens.weight"])
        self.scale, self.complete = 1.0, 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.stored.items():
            yield name, tensor * self.scale
        self.complete += 1

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        assert any(name.endswith("norm.weight") for name, _ in parameters)


def prompts() -> list[list[int]]:
    """Token ids over the whole vocabulary."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def process_state() -> dict[str, Any]:
    """Return what vLLM is known to change in a process, as values that can be compared."""
    spaces = {"torch": torch, "cuda": torch.cuda, "accelerator": torch.accelerator, "Tensor": torch.Tensor}
    functions = {f"{space}.{name}": id(value) for space in spaces for name, value in vars(spaces[space]).items()
                 if callable(value)}  # fmt: skip
    return {
        "functions": functions,
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "python": hash(random.getstate()),
        "numpy": numpy.random.get_state()[1].tolist() + [numpy.random.get_state()[2]],  # type: ignore[index]
        "torch": torch.get_rng_state().tolist(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
        "frozen": gc.get_freeze_count() < 10_000,  # the interpreter itself freezes a few hundred
    }


def raised(function: Any, *arguments: Any, **options: Any) -> str:
    """Return what the error that ``function`` raises says, with its type."""
    try:
        function(*arguments, **options)
    except (ConfigurationError, RolloutError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def rank_main(line: list[str], folder: str, tensor_parallel_size: int) -> dict[str, Any]:
    """Sample with both engines, look at the process before and after; then everything that goes wrong."""
    from megatron.core import parallel_state

    from megatron_camopd.model.passes import PassSettings, score_responses
    from megatron_camopd.rollout.megatron_engine import MegatronEngine
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    native = MegatronEngine(
        trainer.model[0], seed=1, temperature=0.0, end_of_sequence_ids=END_IDS, max_response_length=RESPONSE,
        vocab_size=args.vocab_size, batch_size=3,
    )  # fmt: skip
    settings = VllmSettings(
        model_folder=folder, dtype="float32", seed=1234, temperature=0.0, end_of_sequence_ids=END_IDS,
        max_prompt_length=max(LENGTHS), max_response_length=RESPONSE, vocab_size=args.vocab_size,
        tensor_parallel_size=tensor_parallel_size, kv_cache_bytes=16 * 2**20, max_sequences=64,
    )  # fmt: skip
    ranks = parallel_state.get_data_parallel_world_size()
    indices = torch.arange(parallel_state.get_data_parallel_rank(), len(LENGTHS), ranks).flip(0)
    share = [prompts()[index] for index in indices]
    result: dict[str, Any] = {"native": vars(native.generate(share, indices, step=7))}

    source = StoredWeights(Path(folder))
    scored = score_responses(PassSettings.of(args), trainer.model, RolloutBatch(**result["native"]))
    before = process_state()
    engine = VllmEngine(settings, source)
    engine.synchronize(step=7)
    result["built"] = process_state() == before

    def sample(step: int = 7, keep: slice = slice(None), **changes: Any) -> dict[str, Tensor]:
        engine.settings = dataclasses.replace(settings, **changes)
        return vars(engine.generate(share[keep], indices[keep], step=step))

    result["greedy"] = sample()
    result["used"] = process_state() == before
    result["scored before and after"] = [
        scored,
        score_responses(PassSettings.of(args), trainer.model, RolloutBatch(**result["native"])),
    ]
    for temperature in TEMPERATURES:
        rollout = sample(temperature=temperature)
        args.rollout_temperature = temperature
        scored = score_responses(PassSettings.of(args), trainer.model, RolloutBatch(**rollout))
        result[f"sampled {temperature}"] = rollout | {"scored": scored}
    result["again"] = sample(temperature=1.0)
    result["next step"] = sample(step=8, temperature=1.0)
    result["half"] = sample(keep=slice(0, None, 2), temperature=1.0)

    source.scale = 0.5
    engine.synchronize(step=7)
    result["other weights"] = sample()
    assert engine.llm.reset_prefix_cache()
    result["other weights, nothing cached"] = sample()
    source.scale = 1.0
    engine.synchronize(step=7)
    result["weights again"] = sample()
    result["version"], result["iterated"] = engine.version, source.complete

    result["late"] = raised(sample, time_limit=1e-9)
    result["after late"] = sample(time_limit=600.0)
    if torch.distributed.get_rank() == 1 and tensor_parallel_size == 1:
        engine.llm.llm_engine.step = None  # of the second engine alone
    result["broken"] = raised(sample) if tensor_parallel_size == 1 else ""
    if tensor_parallel_size == 1:
        if torch.distributed.get_rank() == 0:  # the load fails after a tensor, in the first engine alone
            engine.llm.collective_rpc = lambda method, kwargs: 1 // len(next(kwargs["weights_iterator"])[0][:0])
        result["half loaded"] = raised(engine.synchronize, step=8)
    for name, size in (("small", 1024), ("large", 2**50)):
        result[name] = raised(VllmEngine, dataclasses.replace(settings, kv_cache_bytes=size), source)
    result["odd"] = raised(VllmEngine, dataclasses.replace(settings, tensor_parallel_size=3), source)
    if tensor_parallel_size == 1:
        odd_heads = Path(folder).with_name(f"odd-heads-{torch.distributed.get_rank()}")
        odd_heads.mkdir()
        config = json.loads(Path(folder, "config.json").read_text()) | {"head_dim": 24}
        (odd_heads / "config.json").write_text(json.dumps(config))
        result["odd heads"] = raised(VllmEngine, dataclasses.replace(settings, model_folder=str(odd_heads)), source)
    sys.modules["vllm._C"] = None  # type: ignore[assignment]
    result["no libnuma"] = raised(import_vllm)
    result["shared memory"] = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines()
                               if "/dev/shm/" in line]  # fmt: skip
    engine.close()
    return result


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@functools.cache
def results(parent: Path, run: str) -> list[dict[str, Any]]:
    sizes, layout, tensor_parallel_size = RUNS[run]
    world = World(parent / run)
    world.root.mkdir()
    make_checkpoint(world.student, seed=4, **(SIZES | sizes))
    write_prompts(world.general, "general")
    folder = world.root / "student-hf"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(4, 300, 9))}))  # not our ends
    line = world.flags(
        general_teacher_load=world.student, domain_prompts=world.general, max_response_length=RESPONSE, **layout
    )
    return run_ranks(rank_main, 2, line, str(folder), tensor_parallel_size, time_limit=180)


def responses(rollout: dict[str, Tensor]) -> list[list[int]]:
    lengths = zip(rollout["prompt_lengths"].tolist(), rollout["response_lengths"].tolist(), strict=True)
    return [row[start : start + count].tolist() for row, (start, count) in zip(rollout["tokens"], lengths, strict=True)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in ("indices", "prompt_lengths", "response_lengths", "truncated"):
        assert torch.equal(found[name], expected[name]), name
    assert responses(found) == responses(expected)


@pytest.mark.vllm
@each_run
def test_greedy_tokens_are_the_native_engine_s(parent: Path, run: str) -> None:
    for rank in results(parent, run):
        assert_same(rank["greedy"], rank["native"])
        found, expected = rank["greedy"]["rollout_logprobs"], rank["native"]["rollout_logprobs"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    truncated = torch.cat([rank["greedy"]["truncated"] for rank in results(parent, run)])
    assert truncated.any() and not truncated.all()


@pytest.mark.vllm
@pytest.mark.parametrize("temperature", TEMPERATURES)
@each_run
def test_rows_are_the_prompts_given(parent: Path, run: str, temperature: float) -> None:
    for rank in results(parent, run):
        rollout = rank[f"sampled {temperature}"]
        for row, index in enumerate(rollout["indices"].tolist()):
            prompt, response = prompts()[index], responses(rollout)[row]
            assert rollout["tokens"][row, : len(prompt)].tolist() == prompt
            assert max(response) < 300
            assert not set(response[:-1]) & set(END_IDS)
            assert bool(rollout["truncated"][row]) == (response[-1] not in END_IDS)
            assert len(response) == RESPONSE or response[-1] in END_IDS


@pytest.mark.vllm
@pytest.mark.parametrize("temperature", TEMPERATURES)
@each_run
def test_logprobs_are_those_of_the_scoring_pass(parent: Path, run: str, temperature: float) -> None:
    for rank in results(parent, run):
        rollout = rank[f"sampled {temperature}"]
        torch.testing.assert_close(rollout["rollout_logprobs"], rollout["scored"], rtol=0, atol=1e-4)
        assert rollout["scored"].lt(-0.01).any(dim=1).all()


@pytest.mark.vllm
@each_run
def test_samples_depend_on_step_and_place_alone(parent: Path, run: str) -> None:
    """Bit for bit in the same batch; in another batch of this engine by their tokens."""
    drawn = []
    for rank in results(parent, run):
        sampled = rank["sampled 1.0"]
        assert all(torch.equal(rank["again"][name], value) for name, value in sampled.items() if name != "scored")
        assert responses(rank["half"]) == responses(sampled)[::2]
        assert responses(rank["next step"]) != responses(sampled)
        drawn += responses(sampled)
    assert len({tuple(response) for response in drawn}) == len(LENGTHS)


@pytest.mark.vllm
@each_run
def test_synchronization_replaces_weights_and_cached_prefixes(parent: Path, run: str) -> None:
    for rank in results(parent, run):
        assert responses(rank["other weights"]) != responses(rank["greedy"])
        nothing_cached = rank["other weights, nothing cached"]
        assert all(torch.equal(nothing_cached[name], value) for name, value in rank["other weights"].items())
        assert all(torch.equal(rank["weights again"][name], value) for name, value in rank["greedy"].items())
        assert rank["version"] == rank["iterated"] == 3


@pytest.mark.vllm
@each_run
def test_the_process_stays_the_trainer_s(parent: Path, run: str) -> None:
    for rank in results(parent, run):
        assert rank["built"] and rank["used"]
        before, after = rank["scored before and after"]
        assert torch.equal(before, after)
        # What tensor-parallel ranks share has no name any more that a killed process could leave behind.
        assert all(name.endswith("(deleted)") for name in rank["shared memory"]), rank["shared memory"]
        assert any("camopd" in name for name in rank["shared memory"]) == (run == "split")


@pytest.mark.vllm
@each_run
def test_failures_reach_every_rank(parent: Path, run: str) -> None:
    for rank in results(parent, run):
        assert rank["late"].startswith("RolloutError: --rollout-engine vllm, step 7: ")
        assert "--rollout-time-limit" in rank["late"]
        assert_same(rank["after late"], rank["greedy"])
        if run == "replicas":
            assert rank["broken"].startswith("RolloutError: --rollout-engine vllm, step 7: TypeError")
            assert rank["half loaded"].startswith("RolloutError: --rollout-engine vllm, step 8: loading the weights")
            assert "ZeroDivisionError" in rank["half loaded"]


@pytest.mark.vllm
@each_run
def test_what_does_not_fit_names_the_flag(parent: Path, run: str) -> None:
    for rank in results(parent, run):
        assert rank["small"].startswith("ConfigurationError: --rollout-kv-cache-bytes 1024: too little")
        assert rank["large"].startswith(f"ConfigurationError: --rollout-kv-cache-bytes {2**50}: more than is free")
        assert rank["odd"].startswith("ConfigurationError: --rollout-tensor-parallel-size 3")
        if run == "replicas":
            assert rank["odd heads"].startswith("ConfigurationError: --rollout-engine vllm: the model's head dimension")
        assert rank["no libnuma"].startswith("ConfigurationError: --rollout-engine vllm: ")


def test_missing_vllm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigurationError) as caught:
        import_vllm()
    line = str(caught.value)
    assert line.startswith("--rollout-engine vllm: ") and "make setup EXTRAS=vllm" in line and "\n" not in line


def test_prompts_are_spread_by_length() -> None:
    expected = {0: 10, 1: 3, 2: 9, 3: 4, 4: 4}
    assert assign_prompts(expected, 1) == [[0, 1, 2, 3, 4]]
    assert assign_prompts(expected, 2) == [[0, 4], [1, 2, 3]]  # 10 and 9; 9 + 4; 10 + 4; 13 + 3
    assert assign_prompts({0: 1}, 3) == [[0], [], []]
    shares = assign_prompts({index: 1 for index in range(64)}, 4)
    assert [len(share) for share in shares] == [16] * 4 and sorted(sum(shares, [])) == list(range(64))
