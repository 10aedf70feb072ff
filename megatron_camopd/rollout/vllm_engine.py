"""vLLM as rollout engine, in the trainer's processes: no server, no Ray, weights handed over in memory.

The ranks of the world form engines of ``tensor_parallel_size`` neighbouring ranks each, independent of the training
layout. Every rank builds one tensor-parallel part of its engine (vLLM's external launcher), and the ranks of an engine
make the same calls in lockstep. The prompts of all data-parallel replicas are spread over the engines by their expected
length; every rank gets back the responses to the prompts of its own replica (see :mod:`~.exchange`).

Reproducibility. The sampling noise of a response comes from a generator whose seed is a hash of (run seed, step, index
in the global batch), so it depends on nothing else. The log-probabilities also depend on the batch: vLLM computes
requests together, and the shapes of a batch decide in which order sums are rounded. Therefore:

* The same weights, prompts, step, world size and settings give bitwise the same tokens and log-probabilities, as far
  as the kernels are deterministic. On CPU they are; on CUDA vLLM promises it only of its batch-invariant kernels.
  Neither the time nor an earlier step has an influence, because every synchronisation empties the prefix cache. So a
  resumed run samples what the uninterrupted run would have sampled. (Calls between a synchronisation and a rollout,
  such as probes, fill the prefix cache again; a prompt whose beginning is in the cache is computed in another shape.)
* With another batch, number of engines or tensor-parallel size, log-probabilities differ in the last bits, and a
  sampled token differs where two candidates are that close: rarely in float32, soon in bfloat16.

The Megatron engine draws other noise: from the same distribution the two engines sample different responses.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.counter_random import hash_counters
from megatron_camopd.errors import ConfigurationError, EngineLostError, RolloutError, StaleEngineError
from megatron_camopd.rollout.exchange import (
    Response,
    all_gather,
    assemble,
    assign_prompts,
    exchange_responses,
    gather_requests,
)
from megatron_camopd.rollout.vllm_process import construction, import_vllm, never_collect, vllm_context
from megatron_camopd.rollout.vllm_settings import VllmSettings, check_head_size, explain
from megatron_camopd.runtime import accelerator

_PATIENCE = timedelta(days=7)  # between engines, which end at different times; --rollout-time-limit is the real limit
_LOCKSTEP = timedelta(seconds=60)  # between the ranks of one engine, which run in lockstep


class WeightSource(Protocol):
    """Source of the weights that the engine loads."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the model, whole, under their Hugging Face names; collective.

        Tied models too have an ``lm_head.weight``. Every rank yields the same names in the same order, and every rank
        must iterate to the end. A tensor must not change until then: vLLM keeps the tensors of a layer until it has all
        of them.
        """
        ...

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> object:
        """Compare ``parameters``, those of the engine's model on this rank, with what the last pass sent.

        Needs no other rank.

        Raises:
            StaleEngineError: A parameter is not what was sent.
        """
        ...


class VllmEngine:
    """Rollout engine of which every rank runs one tensor-parallel part; implements :class:`~.engine.VerifiableEngine`.

    Construction is collective over the world. ``version`` counts the synchronisations; before the first one the weights
    are noise.

    Raises:
        ConfigurationError: vLLM is missing, does not fit this machine, or finds too little memory. It is raised only on
            the ranks that notice; the other ranks of the same engine may wait until such a rank's process has ended.
    """

    def __init__(self, settings: VllmSettings, source: WeightSource) -> None:
        self.settings, self.source, self.version = settings, source, 0
        size, world = settings.tensor_parallel_size, dist.get_world_size()
        if world % size:
            raise ConfigurationError(f"--rollout-tensor-parallel-size {size}: does not divide the {world} ranks")
        self.engines, self.number = world // size, dist.get_rank() // size
        # Separate gloo groups: prompts and responses are host data, and ranks may wait long for another engine.
        self.world = dist.new_group(backend="gloo", timeout=_PATIENCE)
        peers = [list(range(first, first + size)) for first in range(0, world, size)]
        self.peers = [dist.new_group(ranks, backend="gloo", timeout=_LOCKSTEP) for ranks in peers][self.number]
        self.vllm = import_vllm()
        self.llm = self._build()
        self._asleep: set[str] = set()
        self.max_model_length = settings.max_prompt_length + settings.max_response_length
        self.max_response_length = settings.max_response_length
        self.block_size: int = self.llm.llm_engine.vllm_config.cache_config.block_size

    def _build(self) -> Any:
        settings, on_cpu = self.settings, accelerator.current().kind == "cpu"
        assert settings.kv_cache_bytes or not on_cpu, "vLLM would take a share of the host's memory"
        name = [f"camopd-{os.getpid()}-{time.time_ns()}"]
        dist.broadcast_object_list(name, src=0, group=self.world)
        try:
            with construction(name[0]):
                llm = self.vllm.LLM(
                    settings.model_folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # the folder's own would add its end-of-sequence ids to ours
                    hf_overrides={"vocab_size": settings.vocab_size},
                    dtype=settings.dtype,
                    seed=settings.seed,
                    max_model_len=settings.max_prompt_length + settings.max_response_length,
                    max_num_seqs=settings.max_sequences,
                    gpu_memory_utilization=settings.memory_share,
                    kv_cache_memory_bytes=settings.kv_cache_bytes,
                    tensor_parallel_size=settings.tensor_parallel_size,
                    distributed_executor_backend="external_launcher",
                    enforce_eager=settings.enforce_eager or on_cpu,
                    enable_prefix_caching=settings.prefix_caching,
                    enable_sleep_mode=settings.sleep and not on_cpu,
                    logprobs_mode="processed_logprobs",  # under softmax(z / temperature), which is sampled from
                )
        except (ValueError, RuntimeError) as error:
            if (explanation := explain(error, settings)) is None:
                raise
            raise explanation from error
        never_collect(llm)
        if on_cpu:
            check_head_size(llm.llm_engine.model_config.get_head_size())
        return llm

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Tensor,
        *,
        step: int,
        response_limit: int | None = None,
        stay_awake: bool = False,
    ) -> RolloutBatch:
        """Sample one response for each prompt; collective over the world.

        Arguments and result are those of :meth:`~.engine.VerifiableEngine.generate`.

        Raises:
            RolloutError: A request failed or ``time_limit`` has passed; raised on every rank. The engine can be used
                again after a time limit, but should not be after another failure.
            StaleEngineError: The weights that were loaded on waking up are not those sent; raised on every rank.
            EngineLostError: This rank failed alone within its engine, whose other ranks are stuck inside vLLM; raised
                on this rank alone, a minute later.
        """
        requests = gather_requests(prompts, indices, self.world)
        limit = response_limit or self.settings.max_response_length
        assert self.version, "nothing was synchronised yet"
        assert all(0 < len(prompt) <= self.max_model_length - limit for prompt in requests.prompts.values())
        # The expected length is the prompt's plus the limit: an estimate from earlier steps would be lost on a resume.
        shares = assign_prompts(
            {index: len(prompt) + limit for index, prompt in requests.prompts.items()}, self.engines
        )
        share = shares[self.number]
        responses: dict[int, Response] = {}
        failure: Exception | None = None
        with vllm_context():
            try:
                self._wake()
                for index, response in self._sample({index: requests.prompts[index] for index in share}, step, limit):
                    responses[index] = response
                if not stay_awake:
                    self._fall_asleep()
            except (RolloutError, StaleEngineError) as error:
                failure = error
            except Exception as error:  # whatever it is, the other ranks wait in the exchange below
                failure = RolloutError(f"{type(error).__name__}: {error}")
        self._leave_lockstep(failure, f"step {step}")
        self._agree(failure, f"step {step}")
        own = exchange_responses(responses, shares, requests.wanted_by, self.world)
        return assemble(prompts, indices, own, self.settings.end_of_sequence_ids)

    def describe(self) -> str:
        """Return the engine's name and layout for the log."""
        return f"vLLM, {self.engines} x {self.settings.tensor_parallel_size} process(es)"

    def synchronize(self, *, step: int) -> None:
        """Load the source's weights and empty the prefix cache; collective.

        Raises:
            RolloutError: Loading failed; raised on every rank.
            StaleEngineError: The engine's weights are not those that were sent; raised on every rank.
        """
        with vllm_context():
            failure = self._load()
        self._agree(failure, f"step {step}")
        self.version += 1

    def close(self) -> None:
        """Free weights and cache; no other call may follow.

        Process groups stay. A process may also end without this call.
        """
        with vllm_context():
            self.llm.llm_engine.model_executor.shutdown()

    def _load(self) -> Exception | None:
        """Load the source's weights and return the error, if any.

        The source is iterated to its end in any case, because the other ranks take part in it.
        """
        tensors = self.source.tensors()
        failure: Exception | None = None
        try:
            self._wake_up("weights")
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
            if not self.llm.reset_prefix_cache():
                failure = RolloutError("the prefix cache is in use and cannot be emptied")
        except (RolloutError, StaleEngineError) as error:
            failure = error
        except Exception as error:
            failure = RolloutError(f"loading the weights failed ({type(error).__name__}: {error})")
        for _ in tensors:
            pass
        if failure is None:  # after a failed load the model is incomplete and some of its memory may be missing
            try:
                self.source.check(self._parameters())
            except Exception as error:  # whatever it is, the other ranks wait to agree
                known = isinstance(error, StaleEngineError)
                failure = error if known else RolloutError(f"the weights cannot be checked ({error})")
        return failure

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Return the named parameters of this rank's part of the engine's model."""
        result: Iterator[tuple[str, Any]] = (
            self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.named_parameters()
        )
        return result

    def _wake(self) -> None:
        """Bring weights and cache into GPU memory; weights that were freed are loaded again."""
        if "weights" in self._asleep and (failure := self._load()):
            raise failure
        self._wake_up("kv_cache")

    def _wake_up(self, part: str) -> None:
        if part in self._asleep:
            torch.cuda.empty_cache()  # torch's allocator still holds the memory that training has freed
            try:
                self.llm.wake_up(tags=[part])
            except RuntimeError as error:  # the optimizer allocates its state after the engine is built
                raise RolloutError(
                    f"no room for the engine's {part} beside training ({error}); lower --rollout-memory-share or "
                    "--rollout-kv-cache-bytes"
                ) from error
            self._asleep.remove(part)

    def _fall_asleep(self) -> None:
        if self.settings.sleep and accelerator.current().kind != "cpu":
            self.llm.sleep(level=2)  # nothing is copied to the host: the trainer has the weights
            self._asleep = {"weights", "kv_cache"}

    def _sample(self, requests: Mapping[int, Sequence[int]], step: int, limit: int) -> Iterator[tuple[int, Response]]:
        """Yield the responses with their indices, in the order in which they end."""
        engine, waiting = self.llm.llm_engine, {str(index) for index in requests}
        start, tokens = time.monotonic(), 0
        try:
            for index, prompt in requests.items():
                engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, self._sampling(step, index, limit))
            with self._bar(len(requests), step) as bar:
                while engine.has_unfinished_requests():
                    if self._late(start):
                        raise RolloutError(
                            f"{len(waiting)} of {len(requests)} responses of engine {self.number} had not ended after "
                            f"--rollout-time-limit {self.settings.time_limit:g} s"
                        )
                    for output in filter(lambda output: output.finished, engine.step()):
                        response = output.outputs[0]
                        if response.finish_reason not in ("stop", "length"):
                            raise RolloutError(f"request {output.request_id} ended with {response.finish_reason!r}")
                        waiting.remove(output.request_id)
                        answer = Response(
                            torch.tensor(response.token_ids, dtype=torch.int32),
                            torch.tensor(response.logprobs.logprobs, dtype=torch.float32),
                        )
                        tokens += len(answer.tokens)
                        bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s", refresh=False)
                        bar.update()
                        yield int(output.request_id), answer
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def _late(self, start: float) -> bool:
        """Return whether the time limit has passed, by the clock of the engine's first rank."""
        limit, size = self.settings.time_limit, self.settings.tensor_parallel_size
        if not limit:
            return False
        late = torch.tensor([time.monotonic() - start > limit])
        if size > 1:
            dist.broadcast(late, self.number * size, group=self.peers)
        return bool(late)

    def _sampling(self, step: int, index: int, limit: int) -> Any:
        settings = self.settings
        key = hash_counters(settings.seed, step, index)
        return self.vllm.SamplingParams(
            temperature=settings.temperature,
            max_tokens=limit,
            stop_token_ids=list(settings.end_of_sequence_ids),
            ignore_eos=True,  # the model folder's; stop_token_ids has ours
            seed=int(key) & (2**63 - 1),
            logprobs=0,  # log-probability of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _bar(self, total: int, step: int) -> tqdm:
        hidden = None if self.settings.progress and dist.get_rank() == 0 else True
        of = f" (engine 1 of {self.engines})" if self.engines > 1 else ""
        return tqdm(total=total, desc=f"step {step} rollout{of}", unit="seq", leave=False, disable=hidden)

    def _leave_lockstep(self, failure: Exception | None, when: str) -> None:
        if self.settings.tensor_parallel_size == 1:
            return
        try:
            dist.barrier(group=self.peers)
        except RuntimeError as error:
            raise EngineLostError(f"--rollout-engine vllm, {when}: {failure or error}; its engine is lost") from error

    def _agree(self, failure: Exception | None, when: str) -> None:
        """Raise the first ``failure`` of any rank on every rank; collective over the world."""
        failures = [error for error in all_gather(failure, self.world) if error is not None]
        if failures:
            raise type(failures[0])(f"--rollout-engine vllm, {when}: {failures[0]}")
