"""Exchange of prompts and responses between data-parallel replicas and engines that are laid out differently.

All of it is host data and travels through one gloo group over the world. Every rank learns every prompt, for all must
agree on which engine takes which. A response goes once, from the first rank of the engine that sampled it to each rank
of the replica that asked for it: a rank holds the responses of its own replica, and an engine's first rank those that
it sampled. At 512 responses of 32,768 tokens, 8 bytes a token, that is 16 MiB on each rank of 8 replicas, where all of
them would be 128 MiB.
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
    """``tokens`` [L] int32 of a response with their log-probabilities [L] float32."""

    tokens: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Requests:
    """The prompts of the global batch, the same on every rank.

    prompts    token ids of each by its index in the global batch, indices rising
    wanted_by  for each rank of the world the indices of its replica's prompts, rising
    """

    prompts: dict[int, list[int]]
    wanted_by: list[list[int]]


def all_gather(value: Any, group: Any) -> list[Any]:
    """Return ``value`` of each rank of ``group``, on each."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_requests(prompts: Sequence[Sequence[int]], indices: Tensor, group: Any) -> Requests:
    """Gather the prompts of all replicas; one rank of each sends them.

    Args:
        prompts: token ids of this replica's prompts.
        indices: [N] int64, their places in the global batch.
        group: gloo group over the world.
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
    """Return the indices for each engine, rising, from the ``expected`` length of each index.

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


def exchange_responses(
    held: Mapping[int, Response], shares: Sequence[Sequence[int]], wanted_by: Sequence[Sequence[int]], group: Any
) -> dict[int, Response]:
    """Send every response from the engine that sampled it to the ranks that want it; collective over the world.

    Args:
        held: this rank's responses by index; read on the first rank of each engine, whose other ranks have the same.
        shares: the indices of each engine, of :func:`assign_prompts`.
        wanted_by: for each rank the indices that it wants, of :class:`Requests`.
        group: gloo group over the world, whose ranks are the engines' ranks, one engine after the other.

    Returns:
        The responses to this rank's own indices.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    size = ranks // len(shares)  # ranks of an engine
    routes = {
        (engine * size, target): [index for index in wanted_by[target] if index in share]
        for engine, share in enumerate(map(frozenset, shares))
        for target in range(ranks)
    }
    outgoing = {target: rows for (source, target), rows in routes.items() if source == rank and rows}
    incoming = {source: rows for (source, target), rows in routes.items() if target == rank and rows}
    received = {index: held[index] for index in outgoing.pop(rank, [])}
    incoming.pop(rank, None)

    sent = {t: torch.tensor([len(held[i].tokens) for i in rows], dtype=torch.int32) for t, rows in outgoing.items()}
    lengths = {source: torch.empty(len(rows), dtype=torch.int32) for source, rows in incoming.items()}
    _transfer(sent, lengths, group)
    packed = {target: _pack([held[index] for index in rows]) for target, rows in outgoing.items()}
    buffers = {source: torch.empty(2, int(counts.sum()), dtype=torch.int32) for source, counts in lengths.items()}
    _transfer(packed, buffers, group)
    for source, rows in incoming.items():
        counts = lengths[source].tolist()
        tokens, logprobs = buffers[source][0].split(counts), buffers[source][1].view(torch.float32).split(counts)
        received |= {index: Response(*pair) for index, *pair in zip(rows, tokens, logprobs, strict=True)}
    return received


def assemble(
    prompts: Sequence[Sequence[int]], indices: Tensor, responses: Mapping[int, Response], end_ids: Sequence[int]
) -> RolloutBatch:
    """Return the batch of one rank's ``prompts``, rows in the order given; ``responses`` holds its ``indices``."""
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
    """Return [2, sum of lengths] int32: token ids, and the bits of their log-probabilities."""
    tokens = torch.cat([response.tokens for response in responses])
    logprobs = torch.cat([response.logprobs for response in responses])
    return torch.stack([tokens, logprobs.view(torch.int32)])


def _transfer(outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], group: Any) -> None:
    """Send and receive tensors, by rank of ``group``, all at once; empty ones are not sent."""
    work = []
    for transfer, tensors in ((dist.irecv, incoming), (dist.isend, outgoing)):
        for rank, tensor in tensors.items():
            if tensor.numel():
                work.append(transfer(tensor, dist.get_global_rank(group, rank), group=group))
    for operation in work:
        assert operation is not None, "this rank is in the group"
        operation.wait()
