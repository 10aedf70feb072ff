"""The student's weights in a real vLLM, through the trainer: fresh after every step, and every planted fault is caught.

Three runs of two ranks each, one for each way from a training layout to a rollout layout. A fault is planted on the
last rank alone, between the weights' checks on their way and the engine; every rank must hear of it.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.errors import RolloutError, StaleEngineError
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_checkpoint, write_prompts

pytestmark = pytest.mark.vllm


class Run(NamedTuple):
    """Training layout, rollout layout, model, temperature."""

    layout: dict[str, Any]
    rollout_tensor_parallel_size: int
    tied: bool
    temperature: float


RUNS = {
    "tp2-to-tp1": Run({"tensor_model_parallel_size": 2}, 1, False, 0.7),
    "dp2-to-tp2": Run({}, 2, True, 1.0),
    "pp2-to-tp1": Run({"pipeline_model_parallel_size": 2}, 1, True, 0.7),
    "cp2-to-tp2": Run({"context_parallel_size": 2}, 2, True, 1.0),
}
VOCABULARY, LAYERS = 300, 4
HEAD = "lm_head.weight"
# Prompts longer than the 128 tokens of a cache block (the trainer's own are short), and none a multiple of it.
LENGTHS = (140, 3, 137, 20)
each_run = pytest.mark.parametrize("run", RUNS)

Pairs = Iterator[tuple[str, Tensor]]
Fault = Callable[[str, Tensor, dict[str, Tensor]], list[tuple[str, Tensor]]]


def stale(ending: str) -> Fault:
    """Tensors whose names end so keep the values that they had one synchronisation before."""
    return lambda name, tensor, before: [(name, before[name] if name.endswith(ending) else tensor)]


def dropped(ending: str) -> Fault:
    """Tensors whose names end so do not arrive."""
    return lambda name, tensor, before: [] if name.endswith(ending) else [(name, tensor)]


# vLLM merges q, k and v to one matrix, and gate and up. On the CPU it packs its matrices,
# which then cannot be read: there the probe has to find what checksums find on a GPU.
FAULTS: dict[str, Fault | None] = {
    "stale matrix": stale("layers.1.self_attn.o_proj.weight"),
    "stale part of a merged matrix": stale("layers.2.mlp.up_proj.weight"),
    "stale norm": stale("layers.3.self_attn.k_norm.weight"),
    "stale head": stale(HEAD),
    "missing head": dropped(HEAD),
    "missing part of a merged matrix": dropped("layers.1.self_attn.q_proj.weight"),
    "skipped cache reset": None,
}


# What runs on each rank -------------------------------------------------------------------------------------------


class Tap:
    """On the way of the weights into ``llm``: keeps a copy of the last complete pass, and plants ``fault``."""

    def __init__(self, llm: Any) -> None:
        self.fault: Fault | None = None
        self.before: dict[str, Tensor] = {}
        self.call = llm.collective_rpc
        llm.collective_rpc = self

    def __call__(self, method: str, *, kwargs: dict[str, Any]) -> Any:
        assert method == "reload_weights"
        return self.call(method, kwargs={"weights_iterator": self.through(kwargs["weights_iterator"])})

    def through(self, tensors: Pairs) -> Pairs:
        passed = {}
        for name, tensor in tensors:
            passed[name] = tensor.clone()
            yield from self.fault(name, tensor, self.before) if self.fault else [(name, tensor)]
        self.before = passed


def rank_main(line: list[str]) -> dict[str, Any]:
    """Sample and score before and after a step; then a fault after every further step."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_camopd.model.passes import PassSettings, score_responses
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    proven: Any = trainer.engine
    engine, last = proven._engine, dist.get_rank() == dist.get_world_size() - 1
    tap = Tap(engine.llm)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    indices = torch.arange(
        parallel_state.get_data_parallel_rank(), len(prompts), parallel_state.get_data_parallel_world_size()
    )

    def sample() -> dict[str, Tensor]:
        rollout = proven.generate([prompts[index] for index in indices], indices, step=trainer.step)
        return vars(rollout) | {"scored": score_responses(PassSettings.of(args), trainer.model, rollout)}

    def train() -> None:
        assert not trainer.train_step()["skipped"]
        trainer.step += 1

    proven.synchronize(step=0)
    result: dict[str, Any] = {"before": sample()}
    train()
    old = {name: value for name, value in result["before"].items() if name != "scored"}
    result["old under new"] = score_responses(PassSettings.of(args), trainer.model, RolloutBatch(**old))
    proven.synchronize(step=trainer.step)
    result["after"] = sample()

    result["told"] = {}
    reset = engine.llm.reset_prefix_cache
    for kind, fault in FAULTS.items():
        train()  # a sound synchronisation and probe, then new weights
        if last:
            tap.fault = fault
            engine.llm.reset_prefix_cache = reset if fault else lambda: True
        try:
            proven.synchronize(step=trainer.step)
            result["told"][kind] = "nothing"
        except (StaleEngineError, RolloutError) as error:
            result["told"][kind] = f"{type(error).__name__}: {error}"
        tap.fault, engine.llm.reset_prefix_cache = None, reset
        # A missing matrix is uninitialised memory. What comes out of it, NaN perhaps, stays in the cache's blocks, and
        # attention multiplies unused slots by zero: a real run ends here, this one goes on.
        for cache in engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches:
            cache.zero_()
    train()
    result["synchronised"] = engine.version
    return result


# The tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm-freshness")


@functools.cache
def results(parent: Path, run: str) -> list[dict[str, Any]]:
    layout, size, tied, temperature = RUNS[run]
    made = World(parent / run)
    made.root.mkdir()
    for seed, folder in enumerate((made.student, made.teacher)):
        make_checkpoint(
            folder, seed=seed, tie_word_embeddings=tied, vocab_size=VOCABULARY, num_hidden_layers=LAYERS, head_dim=32,
            initializer_range=0.2, max_position_embeddings=256,
        )  # fmt: skip
    write_prompts(made.general, "general")
    line = made.flags(
        domain_prompts=None, preservation_steps=0, max_prompt_length=150, max_response_length=16, lr=0.01,
        rollout_engine="vllm", rollout_tensor_parallel_size=size, rollout_temperature=temperature,
        rollout_probe_interval=1, rollout_kv_cache_bytes="16MiB", **layout,
    )  # fmt: skip
    return run_ranks(rank_main, 2, line, time_limit=180)


def differences(rollout: dict[str, Tensor], scored: Tensor) -> Tensor:
    """|log mu - log pi| of every response token."""
    mask = torch.arange(scored.shape[1]) < rollout["response_lengths"][:, None]
    return (rollout["rollout_logprobs"].double() - scored.double()).abs()[mask]


@each_run
def test_rollouts_are_of_the_trained_weights_before_and_after_a_step(parent: Path, run: str) -> None:
    for rank in results(parent, run):
        for moment in ("before", "after"):
            rollout = rank[moment]
            assert differences(rollout, rollout["scored"]).max() < 1e-4, moment
            assert rollout["scored"].lt(-0.01).any(dim=1).all()


@each_run
def test_rollouts_of_the_old_weights_are_clearly_off(parent: Path, run: str) -> None:
    for rank in results(parent, run):
        assert differences(rank["before"], rank["old under new"]).max() > 1e-2


@each_run
@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_caught_on_every_rank(parent: Path, run: str, kind: str) -> None:
    first, second = [rank["told"][kind] for rank in results(parent, run)]
    assert first == second
    assert first.startswith(("StaleEngineError: ", "RolloutError: ")), first
