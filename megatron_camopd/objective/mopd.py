"""Vanilla MOPD: both branches in every step, every sample alike (Eq. 2 as a mean over the pooled batch).

    c_{i,t} = 1 / (N L_i)

Each sample is scored by its own branch's teacher; how many samples of each branch there are is ``--mixing-ratio``. The
paper's "w/o dec (1:1)" and "w/o dec (3:1)" are this with ratios 1:1 and 3:1.
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
    """No settings."""

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
        coefficients = broadcast_to_tokens(mean_coefficients(batch.rollout.response_lengths), batch.response_mask)
        return TrainingWeights(coefficients, torch.ones(len(batch), dtype=torch.bool))


def build(args: Namespace, branches: Sequence[BranchSpec]) -> VanillaMOPD:
    """Build the method, which has no settings."""
    return VanillaMOPD()
