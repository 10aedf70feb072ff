"""The method SelecTKD (arXiv 2510.24021): the teacher verifies the student's proposals; rejected tokens weigh less.

    c_{i,t} = V_{i,t} / (N L_i),   V = 1 where accepted, else beta (0 leaves the token out)

    greedy        accepts if the student's most likely id is among the teacher's k most likely ids
    speculative   draws k ids from the student, accepts each id v with probability min(1, pi_T(v) / pi_theta(v)), and
                  accepts the token if any of them is accepted

Batches are pooled over the branches as in Vanilla MOPD. The random numbers are functions of (seed, step, sample,
position), so they are the same in every parallel layout and after every restart.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest, TokenScores
from megatron_camopd.config.settings import Range, Settings, at_least, setting
from megatron_camopd.counter_random import hash_counters, uniform
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective.method import Method, TrainingWeights, broadcast_to_tokens
from megatron_camopd.objective.weights import mean_coefficients
from megatron_camopd.schedule import BranchSpec

_DRAW, _VERDICT = 1, 2  # purposes of a random number, so that draws and verdicts are independent


@dataclass(frozen=True, kw_only=True)
class SelecTKDSettings(Settings):
    """CaMOPD method selectkd: tokens that the teacher verifies."""

    selectkd_verification: Literal["greedy", "speculative"] = setting("greedy", kept=True)
    """selectkd: student's top id in teacher's top k, or any of k draws accepted"""

    selectkd_candidates: int = setting(5, within=at_least(1), kept=True, metavar="K")
    """selectkd: k"""

    selectkd_rejected_weight: float = setting(0.01, within=Range(0, 1), kept=True, metavar="BETA")
    """selectkd: weight of rejected tokens, 0 masks them"""

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check that the vocabulary has as many ids as there are candidates."""
        if args.selectkd_candidates > args.vocab_size:
            raise ConfigurationError(
                f"--selectkd-candidates {args.selectkd_candidates}: the vocabulary has {args.vocab_size} ids; use fewer"
            )


def greedy_acceptance(student_top: Tensor, teacher_top: Tensor) -> Tensor:
    """Return whether the student's top id [..., 1] is among the teacher's top ids [..., k], as [...] bool."""
    return (student_top == teacher_top).any(dim=-1)


def speculative_acceptance(student_logprobs: Tensor, teacher_logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Return whether any of k drawn ids satisfies u < min(1, pi_T / pi_theta).

    Args:
        student_logprobs: [..., k] float, log-probabilities of the drawn ids under the student, nats.
        teacher_logprobs: [..., k] float, log-probabilities of the same ids under the teacher, nats.
        uniforms: [..., k] float, the numbers u in [0, 1).

    Returns:
        [...] bool.
    """
    ratio = torch.exp(teacher_logprobs.double() - student_logprobs.double())
    return (uniforms < ratio.clamp(max=1.0)).any(dim=-1)


@dataclass(frozen=True)
class _SelecTKD:
    """The weights of SelecTKD, which both forms of verification share.

    Attributes:
        candidates: k, the number of ids that take part in the verification of a token.
        rejected_weight: beta, the weight of a rejected token.
    """

    candidates: int
    rejected_weight: float

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
        """Give rejected tokens the share beta of the coefficient that Vanilla MOPD gives them."""
        mask = batch.response_mask
        assert batch.accepted is not None
        verified = torch.full(mask.shape, self.rejected_weight).masked_fill(batch.accepted, 1.0)
        coefficients = broadcast_to_tokens(mean_coefficients(batch.rollout.response_lengths), mask) * verified
        return TrainingWeights(
            coefficients,
            torch.ones(len(batch), dtype=torch.bool),
            metrics={"acceptance_rate": float(batch.accepted[mask].double().mean())},
        )


@dataclass(frozen=True)
class GreedySelecTKD(_SelecTKD):
    """The method SelecTKD with greedy verification: the student's top id must be among the teacher's top k."""

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        """Return a request for the student's most likely id."""
        return ScoreRequest(top_k=1)

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        """Return a request for the teacher's k most likely ids."""
        return ScoreRequest(top_k=self.candidates)

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        """Return the accepted response tokens, [N, R] bool."""
        return greedy_acceptance(student.top_ids, teacher.top_ids) & rollout.response_mask


@dataclass(frozen=True)
class SpeculativeSelecTKD(_SelecTKD):
    """The method SelecTKD with speculative verification of k drawn ids, as in speculative decoding.

    Attributes:
        seed: Seed of the random numbers, the run's ``--seed``.
    """

    seed: int

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        """Return a request for k ids drawn from the student's distribution."""
        return ScoreRequest(uniforms=self._uniforms(rollout, step, _DRAW))

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        """Return a request for the teacher's log-probabilities of the ids that the student drew."""
        return ScoreRequest(ids=student.drawn_ids)

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        """Return the accepted response tokens, [N, R] bool."""
        uniforms = self._uniforms(rollout, step, _VERDICT)
        return speculative_acceptance(student.drawn_logprobs, teacher.id_logprobs, uniforms) & rollout.response_mask

    def _uniforms(self, rollout: RolloutBatch, step: int, purpose: int) -> Tensor:
        """Return the random numbers in [0, 1) of one purpose, [N, R, k] float64."""
        positions = torch.arange(rollout.rollout_logprobs.shape[1])
        draws = torch.arange(self.candidates)
        samples = rollout.indices[:, None, None]
        return uniform(hash_counters(self.seed, purpose, step, samples, positions[:, None], draws))


def build(args: Namespace, branches: Sequence[BranchSpec]) -> Method:
    """Build the method from checked arguments."""
    settings = SelecTKDSettings.of(args)
    candidates, rejected_weight = settings.selectkd_candidates, settings.selectkd_rejected_weight
    if settings.selectkd_verification == "greedy":
        return GreedySelecTKD(candidates, rejected_weight)
    return SpeculativeSelecTKD(candidates, rejected_weight, seed=args.seed)
