"""The tensors of one step, with their shapes, dtypes and units in one place.

A rollout engine fills a :class:`RolloutBatch`; the scoring pass adds the log-probabilities of teacher and student under
Megatron and makes it a :class:`ScoredBatch`. Selection and training read the latter. Choice made: rows are padded on
the right and described by lengths, never by a pad token, so a vocabulary whose pad token is also a real token is no
problem.

Letters: N samples, S padded width of prompt + response, R padded width of the responses. All tensors live on the CPU;
log-probabilities are natural logarithms (nats). Response column t of row i is
``tokens[i, prompt_lengths[i] + t]``.

:class:`Branch` lies here, on the lowest floor, because both the schedule and the objective speak of it; its public name
is ``megatron_camopd.schedule.Branch``.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


class Branch(enum.Enum):
    """Which teacher, prompt stream and score a sample belongs to: general recovery or domain preservation."""

    GENERAL = "general"
    DOMAIN = "domain"


def _join(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Stack rows of different widths: pad every part on the right with zeros to the widest, then reorder the rows."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))[order]
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])[order]


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Prompts with the responses sampled for them.

    indices           [N] int64    place of the sample in the global batch; unique within a step
    tokens            [N, S] int64 prompt then response, padded on the right (padding is never read)
    prompt_lengths    [N] int64    tokens of the prompt
    response_lengths  [N] int64    tokens of the response, a sampled end-of-sequence token included
    rollout_logprobs  [N, R] float32 log mu(y_t | h_t) of the engine that sampled, aligned to the response, zero padded
    truncated         [N] bool     the length limit ended the response, not an end-of-sequence token
    """

    indices: Tensor
    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    rollout_logprobs: Tensor
    truncated: Tensor

    def __post_init__(self) -> None:
        count = len(self)
        for name, dims, dtype in (
            ("indices", 1, torch.int64),
            ("tokens", 2, torch.int64),
            ("prompt_lengths", 1, torch.int64),
            ("response_lengths", 1, torch.int64),
            ("rollout_logprobs", 2, torch.float32),
            ("truncated", 1, torch.bool),
        ):
            value: Tensor = getattr(self, name)
            assert value.dim() == dims and value.shape[0] == count, f"{name}: {tuple(value.shape)} for {count} samples"
            assert value.dtype == dtype, f"{name} is {value.dtype}, not {dtype}"
            assert value.device.type == "cpu", f"{name} lies on {value.device}, not on the CPU"
        if count:
            assert int(self.response_lengths.max()) <= self.rollout_logprobs.shape[1], "rollout_logprobs is too narrow"
            lengths = self.prompt_lengths + self.response_lengths
            assert int(lengths.max()) <= self.tokens.shape[1], "tokens is too narrow"

    def __len__(self) -> int:
        return self.indices.shape[0]

    @property
    def response_mask(self) -> Tensor:
        """[N, R] bool: True where a column holds a response token."""
        columns = torch.arange(self.rollout_logprobs.shape[1])
        return columns[None, :] < self.response_lengths[:, None]

    def take(self, rows: Tensor) -> RolloutBatch:
        """The chosen rows, widths unchanged. ``rows``: [M] int64 row numbers (not ``indices``) or [N] bool."""
        return RolloutBatch(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """All rows of ``parts`` (at least one part), padded to common widths and sorted by ``indices``.

        The order in which the parts come does not matter, so ranks that gather in any order agree.
        """
        indices = torch.cat([part.indices for part in parts])
        assert indices.unique().numel() == indices.numel(), "a sample of the global batch came twice"
        order = torch.argsort(indices)
        names = [field.name for field in dataclasses.fields(RolloutBatch)]
        return RolloutBatch(**{name: _join([getattr(part, name) for part in parts], order) for name in names})


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredBatch:
    """A rollout with the log-probabilities of its response tokens under teacher and student, both scored by Megatron.

    teacher_logprobs  [N, R] float32 log pi_T(y_t | h_t) of the branch's teacher, zero padded like ``rollout_logprobs``
    student_logprobs  [N, R] float32 log pi_theta(y_t | h_t) before the update
    """

    rollout: RolloutBatch
    teacher_logprobs: Tensor
    student_logprobs: Tensor

    def __post_init__(self) -> None:
        for name in ("teacher_logprobs", "student_logprobs"):
            value: Tensor = getattr(self, name)
            assert value.shape == self.rollout.rollout_logprobs.shape, f"{name} has shape {tuple(value.shape)}"
            assert value.dtype == torch.float32, f"{name} is {value.dtype}, not float32"
            assert value.device.type == "cpu", f"{name} lies on {value.device}, not on the CPU"

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def response_mask(self) -> Tensor:
        """[N, R] bool: True where a column holds a response token."""
        return self.rollout.response_mask

    def take(self, rows: Tensor) -> ScoredBatch:
        """The chosen rows, widths unchanged. ``rows``: [M] int64 row numbers (not ``indices``) or [N] bool."""
        return ScoredBatch(self.rollout.take(rows), self.teacher_logprobs[rows], self.student_logprobs[rows])

    @staticmethod
    def concatenate(parts: Sequence[ScoredBatch]) -> ScoredBatch:
        """All rows of ``parts`` (at least one part), padded to common widths and sorted by ``indices``."""
        order = torch.argsort(torch.cat([part.rollout.indices for part in parts]))
        return ScoredBatch(
            RolloutBatch.concatenate([part.rollout for part in parts]),
            _join([part.teacher_logprobs for part in parts], order),
            _join([part.student_logprobs for part in parts], order),
        )
