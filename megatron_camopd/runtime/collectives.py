"""Collectives of a step that Megatron does not provide: batches over data-parallel ranks, results over stages.

In batches, a row is one sample: dimension 0 of every tensor. Results are in rank order, so all ranks get the same bits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator

_ROLLOUT_FIELDS = [field.name for field in dataclasses.fields(RolloutBatch)]


def require_agreement(what: str, value: str) -> None:
    """Check that ``value`` is the same on all ranks of the world. Collective.

    Args:
        what: plural noun for the value, for the error text.
        value: this rank's value.

    Raises:
        ConfigurationError: on every rank, if the values differ.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    others = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
    if others:
        raise ConfigurationError(different_inputs(what, others))


def different_inputs(what: str, others: Sequence[int]) -> str:
    """Return the error text for ranks ``others`` whose ``what`` (a plural noun) differ from those of rank 0."""
    return (
        f"{what} differ between rank 0 and rank(s) {', '.join(map(str, others))}: the processes read different "
        "files; --load, --save, teachers and prompts must be the same on every node"
    )


def first_problem(problem: str | None) -> str | None:
    """Return the problem of the lowest rank that has one, on every rank, so that all end alike; None if none has one.

    Collective.
    """
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)


def broadcast_rows(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, source: int, group: Any) -> Tensor:
    """Broadcast a tensor to every rank of ``group`` and return it on the CPU.

    Args:
        tensor: the tensor on rank ``source``, None on the others.
        shape: its shape.
        dtype: its dtype.
        source: global rank that sends it.
        group: process group.
    """
    device = accelerator.current().device
    buffer = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    assert buffer.shape == shape and buffer.dtype == dtype, (buffer.shape, shape, buffer.dtype, dtype)
    if dist.get_world_size(group) > 1:
        dist.broadcast(buffer, source, group=group)
    return buffer.cpu()


def all_gather_rows(tensor: Tensor, group: Any) -> list[Tensor]:
    """All-gather a CPU tensor [N] or [N, W] over ``group``; N must be the same on every rank, W may differ.

    Returns:
        The tensors of all ranks in rank order, on the CPU. If there are several ranks, [N, W] tensors are padded on the
        right with zeros to the largest W.
    """
    world = dist.get_world_size(group)
    if world == 1:
        return [tensor]
    device = accelerator.current().device
    if tensor.dim() == 2:
        width = torch.tensor([tensor.shape[1]], device=device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
        tensor = torch.nn.functional.pad(tensor, (0, int(width) - tensor.shape[1]))
    wire = tensor.to(device=device, dtype=torch.uint8 if tensor.dtype == torch.bool else tensor.dtype).contiguous()
    gathered = [torch.empty_like(wire) for _ in range(world)]
    dist.all_gather(gathered, wire, group=group)
    return [one.to(device="cpu", dtype=tensor.dtype) for one in gathered]


def gather_scores(local: ScoredBatch, group: Any) -> ScoredBatch:
    """All-gather the global batch, in the order of ``indices``, from equally many samples per data-parallel rank.

    The texts of the rows stay behind: every rank has drawn all prompts itself.
    """
    rollouts = {field: all_gather_rows(getattr(local.rollout, field), group) for field in _ROLLOUT_FIELDS}
    branches = all_gather_rows(local.branches, group)
    scores = {name: all_gather_rows(value, group) for name, value in local.token_values().items()}
    batches = []
    for rank in range(dist.get_world_size(group)):
        rollout = RolloutBatch(**{field: values[rank] for field, values in rollouts.items()})
        batches.append(ScoredBatch(rollout, branches[rank], **{name: values[rank] for name, values in scores.items()}))
    return ScoredBatch.concatenate(batches)


def sum_over(values: dict[str, float], group: Any) -> dict[str, float]:
    """Sum each of the values over the ranks of ``group``, in float64."""
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=accelerator.current().device)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return dict(zip(names, total.tolist(), strict=True))
