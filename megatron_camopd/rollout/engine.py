"""What the trainer asks of a rollout engine.

An engine lives in the trainer's processes and answers for this data-parallel rank's share of the prompts: all
tensor- and pipeline-parallel ranks of the share call it together and get the same batch.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_camopd.batch import RolloutBatch


class RolloutEngine(Protocol):
    """Samples responses from the student's current weights."""

    def generate(self, prompts: Sequence[Sequence[int]], indices: Tensor, *, step: int) -> RolloutBatch:
        """One response per prompt.

        ``prompts``: token ids; ``indices`` [N] int64: their places in the global batch, which together with
        ``step`` and the run's seed determine the sampling noise. Rows come back in the order given.
        """
        ...

    def synchronize(self, *, step: int) -> None:
        """Take over the student's weights, which ``step``'s responses are sampled with; collective."""
        ...


class VerifiableEngine(RolloutEngine, Protocol):
    """An engine with weights of its own, which can be asked short questions to prove that they are the student's.

    max_model_length: tokens of prompt and response together at most. block_size: tokens of one block of its cache.
    max_response_length: tokens of a response at most.
    """

    max_model_length: int
    block_size: int
    max_response_length: int

    def describe(self) -> str:
        """Return the engine's name and layout for the log."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Tensor,
        *,
        step: int,
        response_limit: int | None = None,
        stay_awake: bool = False,
    ) -> RolloutBatch:
        """See :meth:`RolloutEngine.generate`.

        ``response_limit``: tokens of a response at most, if fewer than usual; ``stay_awake``: keep weights and cache,
        for more is sampled before training.
        """
        ...
