"""Exchange of prompts and responses between data-parallel replicas and rollout engines with different layouts.

Prompts and responses are host data and travel through one gloo group over the world. Every rank learns every prompt,
because all ranks must agree on which engine samples which response. A response is sent once to each rank of the replica
that asked for it, by the first rank of the engine that sampled it. So a rank holds the responses of its own replica,
and an engine's first rank also those that it sampled. With 512 responses of 32,768 tokens (134 MB at 8 bytes a
token) on 4 processes, the peak beyond what the engines hold was measured as 102 MB with TP2 x DP2 and 4 engines, and as
136 MB with TP4 and one engine; gathering all responses on all ranks took 373 MB and 1,213 MB.
"""

import heapq
from collections import defaultdict
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
    """One response.

    Attributes:
        tokens: [L] int32.
        logprobs: [L] float32, the tokens' log-probabilities under the engine that sampled them.
    """

    tokens: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Requests:
    """Prompts of the global batch, the same on every rank.

    Attributes:
        prompts: Token ids of each prompt by its index in the global batch, in ascending order of the indices.
        wanted_by: For each rank of the world, the indices of its replica's prompts in ascending order.
    """

    prompts: dict[int, list[int]]
    wanted_by: list[list[int]]


def all_gather(value: Any, group: Any) -> list[Any]:
    """Return the ``value`` of every rank of ``group``, in rank order; collective over the group."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_requests(prompts: Sequence[Sequence[int]], indices: Tensor, group: Any) -> Requests:
    """Gather the prompts of all replicas, which one rank of each replica sends; collective over the world.

    Args:
        prompts: Token ids of this replica's N prompts.
        indices: [N] int64, the prompts' indices in the global batch.
        group: Gloo group over the world.
    """
    speaks = Layout.current().leads_replica
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    flat = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32)
    shares = all_gather((indices, lengths, flat) if speaks else (indices, None, None), group)
    gathered: dict[int, list[int]] = {}
    for places, counts, tokens in shares:
        if counts is not None:
            parts = tokens.split(counts.tolist())
            assert gathered.keys().isdisjoint(places.tolist()), "a sample of the global batch came twice"
            gathered |= {place: part.tolist() for place, part in zip(places.tolist(), parts, strict=True)}
    return Requests(dict(sorted(gathered.items())), [sorted(places.tolist()) for places, _, _ in shares])


def assign_prompts(expected: Mapping[int, int], engines: int) -> list[list[int]]:
    """Spread prompts over engines so that their expected lengths add up to about the same for every engine.

    Longest processing time first: in descending order of length, each prompt goes to the engine with the smallest sum
    so far (on a tie, to the one with the lowest number). No engine gets more than 4/3 of the smallest possible maximum
    (Graham 1969).

    Args:
        expected: Expected length in tokens of prompt and response, by the prompt's index in the global batch.
        engines: Number of engines.

    Returns:
        For each engine the indices of its prompts, in ascending order.
    """
    loads = [(0, engine) for engine in range(engines)]
    shares: list[list[int]] = [[] for _ in range(engines)]
    for index in sorted(expected, key=lambda index: (-expected[index], index)):
        load, engine = loads[0]
        shares[engine].append(index)
        heapq.heapreplace(loads, (load + expected[index], engine))
    return [sorted(share) for share in shares]


def exchange_responses(
    held: Mapping[int, Response], shares: Sequence[Sequence[int]], wanted_by: Sequence[Sequence[int]], group: Any
) -> dict[int, Response]:
    """Send every response from the engine that sampled it to the ranks that want it; collective over the world.

    Args:
        held: This rank's responses by index. Only those of each engine's first rank are sent: its other ranks have
            the same.
        shares: For each engine the indices of its prompts, as :func:`assign_prompts` returns them.
        wanted_by: For each rank the indices that it wants, as in :class:`Requests`.
        group: Gloo group over the world; its first ranks belong to the first engine, the next to the second, and so on.

    Returns:
        The responses that this rank wants, by index.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine_size = ranks // len(shares)
    source_of = {index: engine * engine_size for engine, share in enumerate(shares) for index in share}
    incoming: dict[int, list[int]] = defaultdict(list)
    for index in wanted_by[rank]:
        incoming[source_of[index]].append(index)
    # Indices are in ascending order on both sides, so sender and receiver agree on the order of the rows.
    outgoing = {target: tuple(i for i in wanted if source_of[i] == rank) for target, wanted in enumerate(wanted_by)}
    outgoing = {target: rows for target, rows in outgoing.items() if rows and target != rank}
    received = {index: held[index] for index in incoming.pop(rank, [])}

    # The ranks of a replica want the same rows: these are packed once for all of them.
    counts = {rows: torch.tensor([len(held[i].tokens) for i in rows], dtype=torch.int32) for rows in outgoing.values()}
    lengths = {source: torch.empty(len(rows), dtype=torch.int32) for source, rows in incoming.items()}
    _transfer({target: counts[rows] for target, rows in outgoing.items()}, lengths, group)
    packed = {rows: _pack([held[index] for index in rows]) for rows in counts}
    buffers = {source: torch.empty(2, int(length.sum()), dtype=torch.int32) for source, length in lengths.items()}
    _transfer({target: packed[rows] for target, rows in outgoing.items()}, buffers, group)
    for source, rows in incoming.items():
        sizes = lengths[source].tolist()
        tokens, logprobs = buffers[source][0].split(sizes), buffers[source][1].view(torch.float32).split(sizes)
        received |= {index: Response(*pair) for index, *pair in zip(rows, tokens, logprobs, strict=True)}
    return received


def assemble(
    prompts: Sequence[Sequence[int]], indices: Tensor, responses: Mapping[int, Response], end_ids: Sequence[int]
) -> RolloutBatch:
    """Assemble the rollout batch of one replica.

    Args:
        prompts: Token ids of the replica's N prompts.
        indices: [N] int64, the prompts' indices in the global batch.
        responses: The responses by index; every one of ``indices`` is among them.
        end_ids: Token ids that end a response. A response with another last token counts as truncated.

    Returns:
        The rollouts, rows in the order of ``prompts``.
    """
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


def _pack(responses: Sequence[Response]) -> Tensor:
    """Pack responses into one tensor [2, sum of lengths] int32: token ids, and the bits of their log-probabilities."""
    packed = torch.empty(2, sum(len(response.tokens) for response in responses), dtype=torch.int32)
    torch.cat([response.tokens for response in responses], out=packed[0])
    torch.cat([response.logprobs for response in responses], out=packed[1].view(torch.float32))
    return packed


def _transfer(outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], group: Any) -> None:
    """Send ``outgoing`` and fill ``incoming``, both by rank of ``group``, all at once; empty tensors are not sent."""
    work = []
    for transfer, tensors in ((dist.irecv, incoming), (dist.isend, outgoing)):
        for rank, tensor in tensors.items():
            if tensor.numel():
                work.append(transfer(tensor, dist.get_global_rank(group, rank), group=group))
    for operation in work:
        assert operation is not None, "this rank is in the group"
        operation.wait()
