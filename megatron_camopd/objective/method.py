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

from megatron_camopd.batch import Branch, RolloutBatch, ScoredBatch, TokenQuestion, TokenScores

Composition = Mapping[Branch, int]
"""How many samples of the global batch belong to each branch, in the order in which they lie in it."""


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

    def student_question(self, rollout: RolloutBatch, step: int) -> TokenQuestion:
        """What the student is asked about ``rollout``'s tokens beside their log-probabilities."""
        ...

    def teacher_question(self, student: TokenScores) -> TokenQuestion:
        """What each sample's teacher is asked, once the student has answered."""
        ...

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        """[N, R] bool: whether the teacher accepts the student's proposal for a token; None: not asked."""
        ...

    def weigh(self, batch: ScoredBatch, composition: Composition, step: int) -> TrainingWeights:
        """Coefficients of the global ``batch``, all of whose gaps are finite."""
        ...


class PlainScoring:
    """The first three parts of :class:`Method` for methods that need log-probabilities and entropies alone."""

    def student_question(self, rollout: RolloutBatch, step: int) -> TokenQuestion:
        return TokenQuestion()

    def teacher_question(self, student: TokenScores) -> TokenQuestion:
        return TokenQuestion()

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        return None


def weigh_or_spoil(method: Method, batch: ScoredBatch, composition: Composition, step: int) -> TrainingWeights:
    """``method.weigh``, or NaN coefficients where a log-probability of the batch is not finite.

    Nothing can be ranked or compared then. NaN coefficients make the loss NaN, whatever a method would have left out,
    and the step is skipped and counted.
    """
    mask = batch.response_mask
    if all(torch.isfinite(values[mask]).all() for values in (batch.teacher_logprobs, batch.student_logprobs)):
        return method.weigh(batch, composition, step)
    return TrainingWeights(torch.full(mask.shape, torch.nan).where(mask, 0.0), torch.ones(len(batch), dtype=torch.bool))


def rows_of_branches(places: Tensor, composition: Composition) -> dict[Branch, Tensor]:
    """Row numbers [M] int64 of each branch's samples among those at ``places`` [N] int64 of the global batch.

    The global batch has its branches one after the other, in the order of ``composition``.
    """
    rows, start = {}, 0
    for branch, count in composition.items():
        rows[branch] = ((places >= start) & (places < start + count)).nonzero().flatten()
        start += count
    return rows


def spread(sample_coefficients: Tensor, mask: Tensor) -> Tensor:
    """[N] coefficients of samples on their response tokens: [N, R] float32, 0 outside of ``mask``."""
    return sample_coefficients[:, None].float().where(mask, 0.0)
