"""Collectives of a step: every rank ends with the same global batch, and ranks that read different files stop."""

import dataclasses
import errno
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_camopd.batch import RolloutBatch
from tests.support.processes import run_ranks

RANKS = 3
SAMPLES = 2  # per rank


def share(rank: int) -> RolloutBatch:
    """A rank's samples rank, rank + RANKS, ...; widths differ between ranks, the numbers tell whose they are."""
    indices = torch.arange(rank, RANKS * SAMPLES, RANKS)
    prompt = torch.full((SAMPLES,), rank + 1)
    response = torch.arange(1, SAMPLES + 1) + rank
    width = int(response.max())
    columns = torch.arange(width)[None, :]
    values = torch.where(columns < response[:, None], indices[:, None] + columns / 10, 0.0)
    return RolloutBatch(
        indices=indices,
        tokens=indices[:, None].expand(-1, rank + 1 + width).clone(),
        prompt_lengths=prompt,
        response_lengths=response,
        rollout_logprobs=-values,
        truncated=indices % 2 == 0,
    )


def rank_main() -> dict[str, Any]:
    from megatron_camopd.errors import ConfigurationError, SaveError
    from megatron_camopd.runtime.collectives import gather_rollouts, join_rows, largest, require_agreement, sum_over
    from megatron_camopd.runtime.layout import Axis, Layout
    from megatron_camopd.runtime.writing import written_by_all

    rank = dist.get_rank()
    world = Axis(rank, RANKS, dist.group.WORLD)
    alone = Axis(0, 1, dist.new_subgroups(1)[0])
    axes: dict[str, Any] = {
        "tensor": alone,
        "pipeline": alone,
        "expert": alone,
        "model_group": None,
        "embedding_group": None,
    }
    batch = gather_rollouts(share(rank), Layout(data=world, context=alone, **axes))
    # As context-parallel ranks: each has all samples, which of those of the others differ.
    own = dataclasses.replace(batch, rollout_logprobs=batch.rollout_logprobs - rank)
    of_first = gather_rollouts(own, Layout(data=alone, context=world, **axes))
    rows = [torch.tensor([4, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([3, 0, 2])]
    joined = {
        dtype: join_rows(
            (torch.arange(5)[:, None] * torch.tensor([1, 10]) % 3).to(dtype)[rows[rank]], rows, world.group
        )
        for dtype in (torch.float32, torch.bool, torch.int64)
    }
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
        "batch": vars(batch),
        "of first": vars(of_first),
        "joined": joined,
        "largest": largest((3, 9, 4)[rank], dist.group.WORLD),
        "total": sum_over({"a": float(rank), "b": 0.5}, dist.group.WORLD),
        "line": line,
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(rank_main, RANKS)


def test_every_rank_has_the_global_batch_in_order(results: list[dict[str, Any]]) -> None:
    whole = RolloutBatch.concatenate([share(rank) for rank in range(RANKS)])
    for result in results:
        found = RolloutBatch(**result["batch"])
        assert found.indices.tolist() == list(range(RANKS * SAMPLES))
        assert torch.equal(found.response_lengths, whole.response_lengths)
        assert torch.equal(found.truncated, torch.arange(RANKS * SAMPLES) % 2 == 0)
        assert torch.equal(found.rollout_logprobs, whole.rollout_logprobs)
        for row, length in enumerate(whole.lengths.tolist()):
            assert (found.tokens[row, :length] == row).all()


def test_context_parallel_ranks_take_the_responses_of_the_first(results: list[dict[str, Any]]) -> None:
    for result in results:
        for name, value in results[0]["batch"].items():
            assert torch.equal(result["of first"][name], value), name


def test_rows_are_joined_in_the_order_of_the_batch(results: list[dict[str, Any]]) -> None:
    for result in results:
        for dtype, found in result["joined"].items():
            assert torch.equal(found, (torch.arange(5)[:, None] * torch.tensor([1, 10]) % 3).to(dtype))
        assert result["largest"] == 9


def test_sums(results: list[dict[str, Any]]) -> None:
    assert all(result["total"] == {"a": 3.0, "b": 1.5} for result in results)


def test_ranks_that_read_different_files_all_stop(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["line"].startswith(
            "plans differ between rank 0 and rank(s) 1: the processes read different files"
        )


def test_all_ranks_end_if_one_cannot_write(results: list[dict[str, Any]]) -> None:
    assert {result["written"] for result in results} == {"--save x: cannot be written (No space left on device)"}
