"""A rollout engine that must show now and then, by probes, that its weights are the student's."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.model.passes import PassSettings, score_responses
from megatron_camopd.rollout.engine import VerifiableEngine
from megatron_camopd.rollout.freshness import Tolerance, probe_engine, probe_prompts
from megatron_camopd.runtime.layout import Layout

_RESPONSE_TOKENS = 16  # of a probe's answers, at most
_BEYOND_A_BLOCK = 8  # tokens by which a probe is longer than one block of the KV cache, which alone is cached by prefix


class VerifiedEngine:
    """``engine`` with a probe after its first synchronisation and that of every ``--rollout-probe-interval``-th step.

    ``weight_bytes``: of a synchronisation, for the log.

    Errors of :meth:`synchronize`, beside the engine's: StaleEngineError, on all ranks, before anything was sampled.
    """

    def __init__(
        self,
        engine: VerifiableEngine,
        model: Sequence[MegatronModule],
        passes: PassSettings,
        *,
        probe_interval: int,
        tolerance: Tolerance,
        weight_bytes: int,
    ) -> None:
        self._engine, self._model, self._passes, self._weight_bytes = engine, model, passes, weight_bytes
        self._probe_interval, self._tolerance = probe_interval, tolerance
        self._verified = False
        self._answer = min(_RESPONSE_TOKENS, engine.max_response_length)
        # Where a whole sequence is shorter than a block, nothing is cached by prefix and nothing of it can be stale.
        room = engine.max_model_length - self._answer
        self._prompts = probe_prompts(passes.vocab_size, min(engine.block_size + _BEYOND_A_BLOCK, room))

    def generate(self, prompts: Sequence[Sequence[int]], indices: Tensor, *, step: int) -> RolloutBatch:
        """See :class:`~megatron_camopd.rollout.engine.RolloutEngine`."""
        return self._engine.generate(prompts, indices, step=step)

    def synchronize(self, *, step: int) -> None:
        """See :class:`~megatron_camopd.rollout.engine.RolloutEngine`."""
        start = time.perf_counter()
        self._engine.synchronize(step=step)
        if not self._verified and dist.get_rank() == 0:
            seconds = time.perf_counter() - start
            loaded = f"{self._weight_bytes / 1e6:,.1f} MB of weights loaded in {seconds:.2f}s"
            print(f"rollout engine: {self._engine.describe()}; {loaded}", flush=True)
        interval = self._probe_interval
        if not self._verified or (interval and step % interval == 0):
            self._probe(step)
            self._verified = True

    def _probe(self, step: int) -> None:
        # Every data-parallel replica asks for its own answers: all of them score.
        first = Layout.current().data.rank * len(self._prompts)

        def generate(prompts: Sequence[Sequence[int]], indices: Tensor) -> RolloutBatch:
            return self._engine.generate(
                prompts, indices + first, step=step, response_limit=self._answer, stay_awake=True
            )

        def score(rollout: RolloutBatch) -> Tensor:
            return score_responses(self._passes, self._model, rollout)

        with torch.no_grad():
            probe_engine(generate, score, self._prompts, tolerance=self._tolerance)
