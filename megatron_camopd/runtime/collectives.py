"""Collectives of a step that Megatron does not provide: batches over data-parallel ranks, results over stages.

In batches, a row is one sample: dimension 0 of every tensor. Results are in rank order, so all ranks get the same bits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Axis, Layout

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


def sum_tensor(tensor: Tensor, group: Any) -> Tensor:
    """Return the sum of a CPU tensor over ``group``, on the CPU."""
    if dist.get_world_size(group) == 1:
        return tensor
    wire = tensor.to(accelerator.current().device)
    dist.all_reduce(wire, group=group)
    return wire.cpu()


def largest(value: int, group: Any) -> int:
    """Return the largest ``value`` of the ranks of ``group``."""
    if dist.get_world_size(group) == 1:
        return value
    wire = torch.tensor(value, device=accelerator.current().device)
    dist.all_reduce(wire, op=dist.ReduceOp.MAX, group=group)
    return int(wire)


def all_gather_rows(tensor: Tensor, group: Any) -> list[Tensor]:
    """All-gather CPU tensors [N] or [N, W] over ``group``; N and W may differ between the ranks.

    Returns:
        The tensors of all ranks in rank order, on the CPU. If there are several ranks, [N, W] tensors are padded on the
        right with zeros to the largest W.
    """
    world = dist.get_world_size(group)
    if world == 1:
        return [tensor]
    device = accelerator.current().device
    sizes = torch.zeros(world, 2, dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = torch.tensor([tensor.shape[0], tensor.shape[1] if tensor.dim() == 2 else 0])
    dist.all_reduce(sizes, group=group)
    rows, widths = sizes.cpu().unbind(1)
    fill = [0, int(rows.max()) - tensor.shape[0]]
    if tensor.dim() == 2:
        fill = [0, int(widths.max()) - tensor.shape[1], *fill]
    wire = tensor.to(device=device, dtype=torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
    wire = torch.nn.functional.pad(wire, fill).contiguous()
    gathered = [torch.empty_like(wire) for _ in range(world)]
    dist.all_gather(gathered, wire, group=group)
    return [
        one[:count].to(device="cpu", dtype=tensor.dtype) for one, count in zip(gathered, rows.tolist(), strict=True)
    ]


def gather_rollouts(local: RolloutBatch, layout: Layout) -> RolloutBatch:
    """All-gather the global batch from the data-parallel ranks, in the order of ``indices``.

    The context-parallel ranks of a replica have sampled the same responses; those of the first one count, because
    responses of the others may differ in the last bits.
    """
    values = {field: all_gather_rows(getattr(local, field), layout.data.group) for field in _ROLLOUT_FIELDS}
    ranks = range(layout.data.size)
    whole = RolloutBatch.concatenate(
        [RolloutBatch(**{field: values[field][rank] for field in _ROLLOUT_FIELDS}) for rank in ranks]
    )
    if layout.context.size == 1:
        return whole
    return RolloutBatch(**{field: _of_first(getattr(whole, field), layout.context) for field in _ROLLOUT_FIELDS})


def _of_first(tensor: Tensor, axis: Axis) -> Tensor:
    """Return the CPU tensor of the first rank of ``axis``; those of the others have as many dimensions."""
    source = dist.get_global_rank(axis.group, 0)
    shape = torch.tensor(tensor.shape, device=accelerator.current().device)
    dist.broadcast(shape, source, group=axis.group)
    dtype = tensor.dtype
    wire = tensor.to(torch.uint8) if dtype == torch.bool else tensor
    found = broadcast_rows(wire if axis.rank == 0 else None, torch.Size(shape.tolist()), wire.dtype, source, axis.group)
    return found.to(dtype)


def join_rows(local: Tensor, rows: Sequence[Tensor], group: Any) -> Tensor:
    """All-gather [N] or [N, W] values of the global batch, of which each rank has some rows; W is the same for all.

    Args:
        local: this rank's rows.
        rows: for each rank of ``group`` the numbers of its rows, [M] int64.
        group: process group.
    """
    joined = torch.cat(all_gather_rows(local, group))
    order = torch.argsort(torch.cat(list(rows)))
    return joined[order]


def sum_over(values: dict[str, float], group: Any) -> dict[str, float]:
    """Sum each of the values over the ranks of ``group``, in float64."""
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=accelerator.current().device)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return dict(zip(names, total.tolist(), strict=True))
