"""The interface of a method, which decides which tokens of a global batch are trained and how strongly.

    L = - sum_i sum_t c_{i,t} w_{i,t} max(A_{i,t}, floor) log pi_theta(y_{i,t} | h)

Every method uses this loss; methods differ in the coefficients c, and Relaxed OPD also sets the floor. A method is a
small object that holds its settings. Before scoring it states what it needs to know about the tokens, and after scoring
it returns the coefficients. It sees the whole global batch, so counts such as |S| and the number of kept tokens run
over all ranks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest, TokenScores


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingWeights:
    """The weights that a method gives to the tokens of a global batch.

    Attributes:
        coefficients: [N, R] float32, c_{i,t}. A token with 0 is left out; a sample whose tokens all have 0 is skipped.
        selected: [N] bool, the samples that the method selects; all True for a method that does not select.
        advantage_floor: Lower limit of the advantage A in nats, or None for no limit.
        metrics: Further numbers for the step's record.
    """

    coefficients: Tensor
    selected: Tensor
    advantage_floor: float | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Method(Protocol):
    """The interface of a method; a method keeps no state from step to step."""

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        """Return what the student's scoring pass computes beside log-probabilities and entropies."""
        ...

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        """Return what the teachers' scoring pass computes, given the student's scores."""
        ...

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        """Return where the teacher accepts the student's proposal, [N, R] bool; None if the method does not ask."""
        ...

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
        """Return the weights of the global ``batch``, in which all gaps are finite."""
        ...


class PlainScoring:
    """Base class of methods that need log-probabilities and entropies but no other scores."""

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        """Return a request for nothing beside log-probabilities and entropies."""
        return ScoreRequest()

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        """Return a request for nothing beside log-probabilities and entropies."""
        return ScoreRequest()

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        """Return None: the method does not ask the teacher to accept tokens."""
        return None


def compute_weights(method: Method, batch: ScoredBatch, step: int) -> TrainingWeights:
    """Return the method's weights, or NaN coefficients if a log-probability of the batch is not finite.

    With non-finite log-probabilities samples cannot be ranked. NaN coefficients on all response tokens make the loss
    NaN, also if the method would have left out the tokens concerned, so that the step is skipped and counted.
    """
    mask = batch.response_mask
    if all(torch.isfinite(values[mask]).all() for values in (batch.teacher_logprobs, batch.student_logprobs)):
        return method.weigh(batch, step)
    return TrainingWeights(torch.full(mask.shape, torch.nan).where(mask, 0.0), torch.ones(len(batch), dtype=torch.bool))


def broadcast_to_tokens(sample_coefficients: Tensor, mask: Tensor) -> Tensor:
    """Copy each sample's coefficient to its response tokens: [N] -> [N, R] float32, 0 outside ``mask``."""
    return sample_coefficients[:, None].float().where(mask, 0.0)
