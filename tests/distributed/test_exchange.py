"""Prompts and responses between replicas and engines of other layouts: each rank receives its own rows, once."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import run_ranks

SAMPLES = 13
LAYOUTS = {  # processes, tensor, pipeline and context parallel size of training, ranks of an engine
    "DP4, engines of 1": (4, 1, 1, 1, 1),
    "DP4, engines of 2": (4, 1, 1, 1, 2),
    "TP2 x DP2, engines of 1": (4, 2, 1, 1, 1),
    "TP2 x PP2, engines of 1": (4, 2, 2, 1, 1),
    "PP2 x DP2, one engine of 4": (4, 1, 2, 1, 4),
    "CP2 x DP2, engines of 2": (4, 1, 1, 2, 2),
    "one process": (1, 1, 1, 1, 1),
}


def length_of(index: int) -> int:
    """Tokens of a response; some are empty."""
    return index * 7 % 11


def prompt_of(index: int) -> list[int]:
    return [index, *range(index % 5)]


def rank_main(tensor: int, pipeline: int, context: int, engine_ranks: int) -> dict[str, Any]:
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron.core import parallel_state

    from megatron_camopd.rollout.exchange import Response, assign_prompts, exchange_responses, gather_requests
    from megatron_camopd.runtime.layout import Layout

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context
    )
    data, rank, ranks = Layout.current().data, dist.get_rank(), dist.get_world_size()
    own = torch.arange(data.rank, SAMPLES, data.size).flip(0)
    requests = gather_requests([prompt_of(index) for index in own.tolist()], own, dist.group.WORLD)
    assert requests.prompts == {index: prompt_of(index) for index in range(SAMPLES)}
    assert list(requests.prompts) == list(range(SAMPLES))
    shares = assign_prompts({index: length_of(index) + 1 for index in range(SAMPLES)}, ranks // engine_ranks)
    held = {
        index: Response(
            torch.arange(length_of(index), dtype=torch.int32) + 100 * index,
            -torch.arange(length_of(index)) / 7 - index,
        )
        for index in shares[rank // engine_ranks]
    }
    received_bytes = 0
    packed: dict[int, int] = {}  # bytes of each buffer that is sent, by its address
    receive, send = dist.irecv, dist.isend

    def counting(buffer: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal received_bytes
        received_bytes += buffer.numel() * buffer.element_size()
        return receive(buffer, *arguments, **options)

    def noting(buffer: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if buffer.dim() == 2:  # responses, not their lengths
            packed[buffer.data_ptr()] = buffer.numel() * buffer.element_size()
        return send(buffer, *arguments, **options)

    dist.irecv, dist.isend = counting, noting
    # The other ranks of an engine have the same responses, which are not to be sent again.
    found = exchange_responses(held if rank % engine_ranks == 0 else {}, shares, requests.wanted_by, dist.group.WORLD)
    dist.irecv, dist.isend = receive, send
    at_home = shares[rank // engine_ranks] if rank % engine_ranks == 0 else []
    return {
        "own": sorted(own.tolist()),
        "found": {index: (answer.tokens.clone(), answer.logprobs.clone()) for index, answer in found.items()},
        "received": received_bytes,
        "packed": sum(packed.values()),
        "sampled": sum(8 * length_of(index) for index in at_home),
        "expected": sum(4 + 8 * length_of(index) for index in own.tolist() if index not in at_home),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_receives_its_own_rows_and_no_others(layout: str) -> None:
    processes, *sizes = LAYOUTS[layout]
    ranks = run_ranks(rank_main, processes, *sizes)
    for rank in ranks:
        assert sorted(rank["found"]) == rank["own"]
        for index, (tokens, logprobs) in rank["found"].items():
            assert torch.equal(tokens, torch.arange(length_of(index), dtype=torch.int32) + 100 * index)
            assert torch.equal(logprobs, -torch.arange(length_of(index)) / 7 - index)
        assert rank["received"] == rank["expected"], "a row came twice, or one that belongs to another replica"
        assert rank["packed"] <= rank["sampled"], "a row was copied for each rank that wants it"
    assert {index for rank in ranks for index in rank["own"]} == set(range(SAMPLES))
