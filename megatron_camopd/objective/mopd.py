"""The method Vanilla MOPD: both branches in every step, all samples weighted alike (Eq. 2 over the pooled batch).

    c_{i,t} = 1 / (N L_i)

The teacher of its own branch scores each sample. ``--mixing-ratio`` sets how many samples each branch has. The paper's
"w/o dec (1:1)" and "w/o dec (3:1)" are this method with the ratios 1:1 and 3:1.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_camopd.batch import ScoredBatch
from megatron_camopd.objective.method import PlainScoring, TrainingWeights, broadcast_to_tokens
from megatron_camopd.objective.weights import mean_coefficients
from megatron_camopd.schedule import BranchSpec


@dataclass(frozen=True)
class VanillaMOPD(PlainScoring):
    """The method Vanilla MOPD, which has no settings of its own."""

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
        """Give every sample of the pooled batch the same weight."""
        coefficients = broadcast_to_tokens(mean_coefficients(batch.rollout.response_lengths), batch.response_mask)
        return TrainingWeights(coefficients, torch.ones(len(batch), dtype=torch.bool))


def build(args: Namespace, branches: Sequence[BranchSpec]) -> VanillaMOPD:
    """Build the method; neither the arguments nor the branches matter to it."""
    return VanillaMOPD()
