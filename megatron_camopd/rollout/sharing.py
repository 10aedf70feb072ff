"""How prompts get from the data-parallel ranks to engines that are laid out differently, and responses back.

All of it is host data and goes through one gloo group over the world; every rank learns every prompt and every response
of the step, as it does of the scores later.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.runtime.layout import Layout


@dataclass(frozen=True)
class Response:
    """``tokens`` [L] int32 with their log-probabilities [L] float32; tensors, since millions travel between ranks."""

    tokens: Tensor
    logprobs: Tensor


def all_gather(value: Any, group: Any) -> list[Any]:
    """``value`` of each rank of ``group``, on each."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_prompts(prompts: Sequence[Sequence[int]], indices: Tensor, group: Any) -> dict[int, Sequence[int]]:
    """The prompts of the global batch by index, in rising order; one rank of each data-parallel share sends it."""
    share = dict(zip(indices.tolist(), prompts, strict=True))
    shares = all_gather(share if Layout.current().leads_replica else {}, group)
    gathered = {index: prompt for share in shares for index, prompt in share.items()}
    assert len(gathered) == sum(map(len, shares)), "a sample of the global batch came twice"
    return dict(sorted(gathered.items()))


def spread(expected: Mapping[int, int], engines: int) -> list[list[int]]:
    """Indices for each engine, in rising order, from the ``expected`` length of each index.

    Longest processing time first: the next longest goes to the engine with the least so far (then the lowest number),
    so no engine gets more than 4/3 of the best possible (Graham 1969).
    """
    loads = [(0, engine) for engine in range(engines)]
    shares: list[list[int]] = [[] for _ in range(engines)]
    for index in sorted(expected, key=lambda index: (-expected[index], index)):
        load, engine = loads[0]
        shares[engine].append(index)
        heapq.heapreplace(loads, (load + expected[index], engine))
    return [sorted(share) for share in shares]


def gather_responses(responses: Mapping[int, Response], group: Any) -> dict[int, Response]:
    """The responses of the global batch by index; the ranks of one engine but the first bring none."""
    return {index: response for part in all_gather(responses, group) for index, response in part.items()}


def assemble(
    prompts: Sequence[Sequence[int]], indices: Tensor, responses: Mapping[int, Response], end_ids: Sequence[int]
) -> RolloutBatch:
    """The batch of one rank's ``prompts``, rows in the order given; ``responses`` holds at least its ``indices``."""
    rows = [responses[index] for index in indices.tolist()]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    response_lengths = torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64)
    tokens = torch.zeros(len(rows), int((prompt_lengths + response_lengths).max()), dtype=torch.int64)
    logprobs = torch.zeros(len(rows), int(response_lengths.max()))
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        start, end = len(prompt), len(prompt) + len(row.tokens)
        tokens[number, :start], tokens[number, start:end] = torch.tensor(prompt), row.tokens
        logprobs[number, : end - start] = row.logprobs
    return RolloutBatch(
        indices=indices.cpu(),
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        rollout_logprobs=logprobs,
        truncated=torch.tensor([int(row.tokens[-1]) not in end_ids for row in rows]),
    )
