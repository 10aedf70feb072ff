"""Scored batches of sequences whose lengths are far apart, and uneven coefficients of their tokens."""

import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch

LENGTHS = {
    "far apart": (37, 90, 16, 55),
    "random": tuple(torch.randint(2, 100, (11,), generator=torch.Generator().manual_seed(3)).tolist()),
}
CASES = {"all": slice(None), "one sample": slice(2, 3)}  # the samples that are trained


def ragged(lengths: tuple[int, ...]) -> ScoredBatch:
    """A batch of random tokens whose prompts take about a third; the teacher is some nats away."""
    generator = torch.Generator().manual_seed(len(lengths))
    whole = torch.tensor(lengths)
    prompts = (whole // 3).clamp(min=1)
    shape = (len(lengths), int((whole - prompts).max()))
    student = -5 * torch.rand(shape, generator=generator)
    rollout = RolloutBatch(
        indices=torch.arange(len(lengths)),
        tokens=torch.randint(300, (len(lengths), int(whole.max())), generator=generator),
        prompt_lengths=prompts,
        response_lengths=whole - prompts,
        rollout_logprobs=student,
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
    )
    teacher = student + torch.randn(shape, generator=generator)
    return ScoredBatch(rollout, torch.zeros(len(lengths), dtype=torch.int64), teacher, student)


def coefficients(batch: ScoredBatch, case: str) -> Tensor:
    """[N, R] float64: uneven weights of the tokens, most of the first column's 0."""
    generator = torch.Generator().manual_seed(7)
    values = torch.rand(batch.response_mask.shape, generator=generator, dtype=torch.float64) / len(batch)
    chosen = torch.zeros(len(batch), dtype=torch.bool)
    chosen[CASES[case]] = True
    return values * batch.response_mask * chosen[:, None]
