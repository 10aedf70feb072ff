"""Collectives of a step: every rank ends with the same global batch, and ranks that read different files stop."""

import errno
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from tests.support.processes import run_ranks

RANKS = 3
SAMPLES = 2  # per rank


def share(rank: int) -> ScoredBatch:
    """A rank's samples rank, rank + RANKS, ...; widths differ between ranks, the numbers tell whose they are."""
    indices = torch.arange(rank, RANKS * SAMPLES, RANKS)
    prompt = torch.full((SAMPLES,), rank + 1)
    response = torch.arange(1, SAMPLES + 1) + rank
    width = int(response.max())
    columns = torch.arange(width)[None, :]
    values = torch.where(columns < response[:, None], indices[:, None] + columns / 10, 0.0)
    rollout = RolloutBatch(
        indices=indices,
        tokens=indices[:, None].expand(-1, rank + 1 + width).clone(),
        prompt_lengths=prompt,
        response_lengths=response,
        rollout_logprobs=-values,
        truncated=indices % 2 == 0,
    )
    return ScoredBatch(rollout, indices % 2, teacher_logprobs=-values - 1, student_logprobs=-values - 2)


def rank_main() -> dict[str, Any]:
    from megatron_camopd.errors import ConfigurationError, SaveError
    from megatron_camopd.runtime.collectives import gather_scores, require_agreement, sum_over
    from megatron_camopd.runtime.writing import written_by_all

    rank = dist.get_rank()
    batch = gather_scores(share(rank), dist.group.WORLD)
    require_agreement("plans", "the same")
    try:
        require_agreement("plans", "another" if rank == 1 else "the same")
        line = ""
    except ConfigurationError as error:
        line = str(error)
    written = ""
    with written_by_all("--save x"):
        pass
    try:
        with written_by_all("--save x"):
            if rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
    except SaveError as error:
        written = str(error)
    return {
        "written": written,
        "indices": batch.rollout.indices,
        "tokens": batch.rollout.tokens,
        "lengths": batch.rollout.response_lengths,
        "truncated": batch.rollout.truncated,
        "student": batch.student_logprobs,
        "total": sum_over({"a": float(rank), "b": 0.5}, dist.group.WORLD),
        "line": line,
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(rank_main, RANKS)


def test_every_rank_has_the_global_batch_in_order(results: list[dict[str, Any]]) -> None:
    whole = ScoredBatch.concatenate([share(rank) for rank in range(RANKS)])
    for result in results:
        assert result["indices"].tolist() == list(range(RANKS * SAMPLES))
        assert torch.equal(result["lengths"], whole.rollout.response_lengths)
        assert torch.equal(result["truncated"], torch.arange(RANKS * SAMPLES) % 2 == 0)
        assert torch.equal(result["student"], whole.student_logprobs)
        for row, length in enumerate((whole.rollout.prompt_lengths + whole.rollout.response_lengths).tolist()):
            assert (result["tokens"][row, :length] == row).all()


def test_sums(results: list[dict[str, Any]]) -> None:
    assert all(result["total"] == {"a": 3.0, "b": 1.5} for result in results)


def test_ranks_that_read_different_files_all_stop(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["line"].startswith(
            "plans differ between rank 0 and rank(s) 1: the processes read different files"
        )


def test_all_ranks_end_if_one_cannot_write(results: list[dict[str, Any]]) -> None:
    assert {result["written"] for result in results} == {"--save x: cannot be written (No space left on device)"}
