"""The few collectives of a step that Megatron does not do itself: rows across data parallel, results across stages.

All of them keep the order of ranks, so every rank ends with the same bits.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator

_ROLLOUT_FIELDS = [field.name for field in dataclasses.fields(RolloutBatch)]


def require_agreement(what: str, value: str) -> None:
    """Errors: ConfigurationError, on every rank, unless all ranks of the world bring the same ``value``."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    others = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
    if others:
        raise ConfigurationError(
            f"{what} differ between rank 0 and rank(s) {', '.join(map(str, others))}: the processes read different "
            "files; --load, --save, teachers and prompts must be the same on every node"
        )


def broadcast_rows(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, source: int, group: Any) -> Tensor:
    """``tensor`` of global rank ``source`` on every rank of ``group``; the others pass None. Lies on the CPU."""
    device = accelerator.current().device
    buffer = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    assert buffer.shape == shape and buffer.dtype == dtype, (buffer.shape, shape, buffer.dtype, dtype)
    if dist.get_world_size(group) > 1:
        dist.broadcast(buffer, source, group=group)
    return buffer.cpu()


def all_gather_rows(tensor: Tensor, group: Any) -> list[Tensor]:
    """One CPU tensor [N, ...] per rank of ``group``; every rank brings the same N, widths [N, W] may differ."""
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
    return [part.to(device="cpu", dtype=tensor.dtype) for part in gathered]


def gather_scores(local: ScoredBatch, group: Any) -> ScoredBatch:
    """Return the global batch on every rank, in the order of ``indices``, from each data-parallel rank's equal share.

    The texts of the rows stay behind: every rank has drawn all prompts itself.
    """
    rollouts = {field: all_gather_rows(getattr(local.rollout, field), group) for field in _ROLLOUT_FIELDS}
    branches = all_gather_rows(local.branches, group)
    scores = {name: all_gather_rows(value, group) for name, value in local.token_values().items()}
    parts = []
    for rank in range(dist.get_world_size(group)):
        rollout = RolloutBatch(**{field: values[rank] for field, values in rollouts.items()})
        parts.append(ScoredBatch(rollout, branches[rank], **{name: values[rank] for name, values in scores.items()}))
    return ScoredBatch.concatenate(parts)


def sum_over(values: dict[str, float], group: Any) -> dict[str, float]:
    """Each value summed in float64 over the ranks of ``group``."""
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=accelerator.current().device)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return dict(zip(names, total.tolist(), strict=True))
