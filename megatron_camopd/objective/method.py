"""What a method is: which tokens of a step's global batch are trained, and how strongly.

    L = - sum_i sum_t c_{i,t} w_{i,t} max(A_{i,t}, floor) log pi_theta(y_{i,t} | h)

Every method is this one loss with other coefficients c and, for one of them, a floor. A method is a small object with
its settings; it is asked before scoring what it wants to know about the tokens, and after it for the coefficients. It
sees the whole global batch, so that counts like |S| and the number of kept tokens run over all ranks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest, TokenScores


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingWeights:
    """A method's answer about a global batch.

    coefficients     [N, R] float32 c_{i,t}; 0 leaves a token out, and a sample whose tokens are all 0 is not computed
    selected         [N] bool       the samples that the method singles out (all, where it does not)
    advantage_floor  nats           lower limit of A, or None
    metrics          further numbers for the step's record
    """

    coefficients: Tensor
    selected: Tensor
    advantage_floor: float | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Method(Protocol):
    """The interface; see the files beside this one. Methods keep no state from step to step."""

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        """What the student is asked about ``rollout``'s tokens beside their log-probabilities."""
        ...

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        """What each sample's teacher is asked, once the student has answered."""
        ...

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        """[N, R] bool: whether the teacher accepts the student's proposal for a token; None: not asked."""
        ...

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
        """Coefficients of the global ``batch``, all of whose gaps are finite."""
        ...


class PlainScoring:
    """The first three parts of :class:`Method` for methods that need log-probabilities and entropies alone."""

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        return ScoreRequest()

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        return ScoreRequest()

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        return None


def compute_weights(method: Method, batch: ScoredBatch, step: int) -> TrainingWeights:
    """``method.weigh``, or NaN coefficients where a log-probability of the batch is not finite.

    Nothing can be ranked or compared then. NaN coefficients make the loss NaN, whatever a method would have left out,
    and the step is skipped and counted.
    """
    mask = batch.response_mask
    if all(torch.isfinite(values[mask]).all() for values in (batch.teacher_logprobs, batch.student_logprobs)):
        return method.weigh(batch, step)
    return TrainingWeights(torch.full(mask.shape, torch.nan).where(mask, 0.0), torch.ones(len(batch), dtype=torch.bool))


def broadcast_to_tokens(sample_coefficients: Tensor, mask: Tensor) -> Tensor:
    """Give every response token its sample's coefficient: [N] -> [N, R] float32, 0 outside of ``mask``."""
    return sample_coefficients[:, None].float().where(mask, 0.0)
