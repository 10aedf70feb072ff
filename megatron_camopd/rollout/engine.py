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
