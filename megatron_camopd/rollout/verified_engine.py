"""Rollout engine whose weights are compared with the student's by probes at regular intervals."""

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

_RESPONSE_TOKENS = 16  # largest number of tokens of a response to a probe
_BEYOND_A_BLOCK = 8  # tokens of a probe beyond one block of the KV cache: only whole blocks are cached by prefix


class VerifiedEngine:
    """Engine that probes another one after its first synchronisation and every ``probe_interval`` steps.

    Args:
        engine: The engine that samples.
        model: The student, this rank's model chunks.
        passes: Settings of the pass that scores the probes' responses.
        probe_interval: Steps between two probes; 0: only the first synchronisation is followed by a probe.
        tolerance: Largest differences of log-probabilities that a probe allows.
        weight_bytes: Size of the weights that a synchronisation loads, for the log.
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
        # Where the longest sequence is shorter than a block, the prefix cache stays empty: shorter probes suffice.
        room = engine.max_model_length - self._answer
        self._prompts = probe_prompts(passes.vocab_size, min(engine.block_size + _BEYOND_A_BLOCK, room))

    def generate(self, prompts: Sequence[Sequence[int]], indices: Tensor, *, step: int) -> RolloutBatch:
        """Sample one response for each prompt; see :meth:`~.engine.RolloutEngine.generate`."""
        return self._engine.generate(prompts, indices, step=step)

    def synchronize(self, *, step: int) -> None:
        """Take over the student's weights and probe the engine where it is due; collective.

        Raises:
            StaleEngineError: The engine's weights are not the student's; raised on all ranks, before the step samples.
        """
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
        # Every data-parallel replica sends its own probes, with indices of its own, and scores the responses.
        first = Layout.current().data.rank * len(self._prompts)

        def generate(prompts: Sequence[Sequence[int]], indices: Tensor) -> RolloutBatch:
            return self._engine.generate(
                prompts, indices + first, step=step, response_limit=self._answer, stay_awake=True
            )

        def score(rollout: RolloutBatch) -> Tensor:
            return score_responses(self._passes, self._model, rollout)

        with torch.no_grad():
            probe_engine(generate, score, self._prompts, tolerance=self._tolerance)
