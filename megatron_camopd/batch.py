"""The tensors of one training step, with their shapes, dtypes and units.

A rollout engine fills a :class:`RolloutBatch`. The scoring pass adds the log-probabilities under teacher and student,
both computed by Megatron, and makes it a :class:`ScoredBatch`, which selection and training read. Rows are padded on
the right and described by lengths instead of a pad token, because in some vocabularies the pad token is a real token.

Letters: N samples, S padded width of prompt + response, R padded width of the responses. All tensors are on the CPU;
log-probabilities and entropies are in nats. Response column t of row i is ``tokens[i, prompt_lengths[i] + t]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def _join(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Stack the rows of ``parts``, padded on the right with zeros to the widest, and reorder them by ``order``."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))[order]
    width = max(part.shape[1] for part in parts)
    padding = (0, 0) * (parts[0].dim() - 2)
    return torch.cat([pad(part, (*padding, 0, width - part.shape[1])) for part in parts])[order]


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Prompts with the responses sampled for them.

    indices           [N] int64    index of the sample in the global batch; unique within a step
    tokens            [N, S] int64 prompt then response, padded on the right (padding is never read)
    prompt_lengths    [N] int64    tokens of the prompt
    response_lengths  [N] int64    tokens of the response, a sampled end-of-sequence token included
    rollout_logprobs  [N, R] float32 log mu(y_t | h_t) of the engine that sampled, aligned to the response, zero padded
    truncated         [N] bool     whether the length limit ended the response instead of an end-of-sequence token
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
        return int(self.indices.shape[0])

    @property
    def lengths(self) -> Tensor:
        """Tokens of prompt and response together, [N] int64."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:
        """Mask of the response tokens, [N, R] bool: True where a column holds one."""
        columns = torch.arange(self.rollout_logprobs.shape[1])
        return columns[None, :] < self.response_lengths[:, None]

    def take(self, rows: Tensor) -> RolloutBatch:
        """Return the chosen rows, widths unchanged. ``rows``: [M] int64 row numbers (not ``indices``) or [N] bool."""
        return RolloutBatch(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """Return all rows of ``parts`` (at least one part), padded to common widths and sorted by ``indices``.

        The result does not depend on the order of the parts, so all ranks get the same batch.
        """
        indices = torch.cat([part.indices for part in parts])
        assert indices.unique().numel() == indices.numel(), "a sample of the global batch came twice"
        order = torch.argsort(indices)
        names = [field.name for field in dataclasses.fields(RolloutBatch)]
        return RolloutBatch(**{name: _join([getattr(part, name) for part in parts], order) for name in names})


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Request to a scoring pass for more than the log-probability and the entropy of every response token.

    top_k     number of the most likely ids that are wanted
    ids       [N, R, K] int64   ids whose log-probabilities are wanted
    uniforms  [N, R, D] float64 numbers in [0, 1), each of which draws an id
    """

    top_k: int = 0
    ids: Tensor | None = None
    uniforms: Tensor | None = None

    def take(self, rows: Tensor) -> ScoreRequest:
        """Return the request for the chosen rows; ``rows`` as for :meth:`RolloutBatch.take`."""
        return ScoreRequest(self.top_k, *(None if x is None else x[rows] for x in (self.ids, self.uniforms)))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of every response token of a batch under one model, zero padded; on the CPU.

    logprobs       [N, R] float32        log-probability of the token, at the sampling temperature
    entropies      [N, R] float32        entropy of the model's distribution of the token, at that temperature
    top_ids        [N, R, top_k] int64   the most likely ids, the most likely first
    id_logprobs    [N, R, K] float32     log-probabilities of the requested ``ids``
    drawn_ids      [N, R, D] int64       ids drawn with ``uniforms``
    drawn_logprobs [N, R, D] float32     log-probabilities of the drawn ids

    The last dimension of the last four is 0 if the request did not ask for them.
    """

    logprobs: Tensor
    entropies: Tensor
    top_ids: Tensor
    id_logprobs: Tensor
    drawn_ids: Tensor
    drawn_logprobs: Tensor

    @staticmethod
    def merge(parts: Sequence[tuple[Tensor, TokenScores]]) -> TokenScores:
        """Return the scores of all rows from ``parts``: pairs of row numbers [M] int64 and the scores of M rows."""
        order = torch.argsort(torch.cat([rows for rows, _ in parts]))
        names = [field.name for field in dataclasses.fields(TokenScores)]
        return TokenScores(**{name: _join([getattr(part, name) for _, part in parts], order) for name in names})


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredBatch:
    """A rollout with the log-probabilities of its response tokens under teacher and student, both scored by Megatron.

    branches          [N] int64      branch of each sample, as an index into the table of branches
    teacher_logprobs  [N, R] float32 log pi_T(y_t | h_t) of the teacher of the sample's branch, zero padded
    student_logprobs  [N, R] float32 log pi_theta(y_t | h_t) before the update, zero padded
    student_entropies [N, R] float32 entropy of pi_theta(. | h_t), or None if it was not measured
    accepted          [N, R] bool    whether the teacher accepts the student's proposal for the token, or None if the
                                     method does not ask (SelecTKD does)
    prompt_ids        N strings      id of the prompt's row in its file, or empty if not known
    categories        N strings      category of that row, None for a row without one, or empty if not known
    """

    rollout: RolloutBatch
    branches: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    student_entropies: Tensor | None = None
    accepted: Tensor | None = None
    prompt_ids: tuple[str, ...] = ()
    categories: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        assert self.branches.shape == (len(self),) and self.branches.dtype == torch.int64, self.branches
        for texts in (self.prompt_ids, self.categories):
            assert len(texts) in (0, len(self)), f"{len(texts)} texts for {len(self)} samples"
        for name, dtype in (
            ("teacher_logprobs", torch.float32),
            ("student_logprobs", torch.float32),
            ("student_entropies", torch.float32),
            ("accepted", torch.bool),
        ):
            value: Tensor | None = getattr(self, name)
            if value is None and name in ("student_entropies", "accepted"):
                continue
            assert value is not None, name
            assert value.shape == self.rollout.rollout_logprobs.shape, f"{name} has shape {tuple(value.shape)}"
            assert value.dtype == dtype, f"{name} is {value.dtype}, not {dtype}"
            assert value.device.type == "cpu", f"{name} lies on {value.device}, not on the CPU"

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def response_mask(self) -> Tensor:
        """Mask of the response tokens, [N, R] bool: True where a column holds one."""
        return self.rollout.response_mask

    def rows_by_branch(self) -> dict[int, Tensor]:
        """Return the row numbers, [M] int64, of each branch that has samples, in the order of the table."""
        return {branch: (self.branches == branch).nonzero().flatten() for branch in self.branches.unique().tolist()}

    def token_values(self) -> dict[str, Tensor]:
        """Return the [N, R] tensors beside the rollout, by name, without those that are None."""
        names = ("teacher_logprobs", "student_logprobs", "student_entropies", "accepted")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def take(self, rows: Tensor) -> ScoredBatch:
        """Return the chosen rows, widths unchanged. ``rows``: [M] int64 row numbers (not ``indices``) or [N] bool."""
        numbers = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        texts = {
            name: tuple(values[row] for row in numbers.tolist()) if values else ()
            for name, values in (("prompt_ids", self.prompt_ids), ("categories", self.categories))
        }
        values = {name: value[rows] for name, value in self.token_values().items()}
        return ScoredBatch(self.rollout.take(rows), self.branches[rows], **values, **texts)

    @staticmethod
    def concatenate(parts: Sequence[ScoredBatch]) -> ScoredBatch:
        """Return all rows of ``parts`` (at least one part), padded to common widths and sorted by ``indices``."""
        order = torch.argsort(torch.cat([part.rollout.indices for part in parts]))
        values = [part.token_values() for part in parts]
        texts = {}
        for name in ("prompt_ids", "categories"):
            joined = [text for part in parts for text in getattr(part, name)]
            texts[name] = tuple(joined[place] for place in order.tolist()) if joined else ()
        return ScoredBatch(
            RolloutBatch.concatenate([part.rollout for part in parts]),
            torch.cat([part.branches for part in parts])[order],
            **{name: _join([value[name] for value in values], order) for name in values[0]},
            **texts,
        )
