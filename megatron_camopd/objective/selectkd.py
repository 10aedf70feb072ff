"""SelecTKD (arXiv 2510.24021): the teacher verifies what the student proposes; rejected tokens count little or nothing.

    c_{i,t} = V_{i,t} / (N L_i),   V = 1 where accepted, else beta

    greedy        the student's most likely id is among the teacher's k most likely
    speculative   the student draws k ids; one of them, v, is accepted with probability min(1, pi_T(v) / pi_theta(v))

Used within Vanilla MOPD's pooled batch. The draws and their verdicts are functions of (seed, step, sample, position),
so every layout and every restart takes the same ones.
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

_DRAW, _VERDICT = 1, 2  # what a random number is for


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
    """Whether the student's top id [..., 1] is among the teacher's [..., k]; [...] bool."""
    return (student_top == teacher_top).any(dim=-1)


def speculative_acceptance(student_logprobs: Tensor, teacher_logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Whether any of k draws passes u < min(1, pi_T / pi_theta); all [..., k], the result [...] bool."""
    ratio = torch.exp(teacher_logprobs.double() - student_logprobs.double())
    return (uniforms < ratio.clamp(max=1.0)).any(dim=-1)


@dataclass(frozen=True)
class _SelecTKD:
    """``candidates``: k; ``rejected_weight``: beta."""

    candidates: int
    rejected_weight: float

    def weigh(self, batch: ScoredBatch, step: int) -> TrainingWeights:
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
    """Verification by the teacher's top k."""

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        return ScoreRequest(top_k=1)

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        return ScoreRequest(top_k=self.candidates)

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        return greedy_acceptance(student.top_ids, teacher.top_ids) & rollout.response_mask


@dataclass(frozen=True)
class SpeculativeSelecTKD(_SelecTKD):
    """Verification of k draws as in speculative decoding."""

    seed: int

    def student_request(self, rollout: RolloutBatch, step: int) -> ScoreRequest:
        return ScoreRequest(uniforms=self._uniforms(rollout, step, _DRAW))

    def teacher_request(self, student: TokenScores) -> ScoreRequest:
        return ScoreRequest(ids=student.drawn_ids)

    def accepted(self, rollout: RolloutBatch, step: int, student: TokenScores, teacher: TokenScores) -> Tensor | None:
        uniforms = self._uniforms(rollout, step, _VERDICT)
        return speculative_acceptance(student.drawn_logprobs, teacher.id_logprobs, uniforms) & rollout.response_mask

    def _uniforms(self, rollout: RolloutBatch, step: int, purpose: int) -> Tensor:
        """[N, R, k] float64."""
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
