"""Protocols that a rollout engine implements for the trainer.

An engine runs in the trainer's processes. Each data-parallel replica asks it for the responses to its own share of the
prompts: all tensor- and pipeline-parallel ranks of the replica call it together and get the same batch.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_camopd.batch import RolloutBatch


class RolloutEngine(Protocol):
    """Engine that samples responses from the student's current weights."""

    def generate(self, prompts: Sequence[Sequence[int]], indices: Tensor, *, step: int) -> RolloutBatch:
        """Sample one response for each prompt.

        The run's seed, ``step`` and a prompt's index determine the sampling noise of its response.

        Args:
            prompts: Token ids of the N prompts of this data-parallel replica.
            indices: [N] int64, the prompts' indices in the global batch.
            step: Training step.

        Returns:
            The rollouts, rows in the order of ``prompts``.
        """
        ...

    def synchronize(self, *, step: int) -> None:
        """Take over the student's weights, from which the responses of ``step`` are sampled; collective."""
        ...


class VerifiableEngine(RolloutEngine, Protocol):
    """Engine with its own copy of the weights, which short probes can compare with the student.

    Attributes:
        max_model_length: Largest number of tokens of prompt and response together.
        block_size: Tokens in one block of the KV cache.
        max_response_length: Largest number of tokens of a response.
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
        """Sample one response for each prompt, as :meth:`RolloutEngine.generate` does.

        Args:
            prompts: See :meth:`RolloutEngine.generate`.
            indices: See :meth:`RolloutEngine.generate`.
            step: Training step.
            response_limit: Largest number of tokens of a response, at most :attr:`max_response_length`, its default.
            stay_awake: Keep weights and cache in memory afterwards, because more is sampled before training goes on.
        """
        ...
