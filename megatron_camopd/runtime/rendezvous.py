"""Exchange of values between the processes of one command before they have formed a process group.

It uses the key-value store at which torchrun's processes (or others with MASTER_ADDR and MASTER_PORT) meet anyway.
"""

import datetime
import json
import os
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_TIMEOUT = datetime.timedelta(hours=2)
"""Hashing terabytes takes long; a process that ended with an error takes the others down through torchrun."""

_stores: list[Any] = []  # kept until the end: rank 0 may host the store in which the process group meets next
_rounds = 0


def process_number() -> int:
    """Return this process's number among those of the command (RANK), 0 if it runs alone."""
    return int(os.environ.get("RANK", "0"))


def exchange(name: str, value: Any) -> list[Any]:
    """Return the JSON ``value`` of every process, in rank order; collective.

    Args:
        name: Name of the values, the same on all processes.
        value: This process's value.
    """
    global _rounds
    if dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value)
        return gathered
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return [value]
    if not _stores:
        _stores.append(next(rendezvous("env://", timeout=_TIMEOUT))[0])
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"camopd/{start}/{name}/{_rounds}", _stores[0])
    store.set_timeout(_TIMEOUT)
    _rounds += 1
    store.set(str(process_number()), json.dumps(value))
    return [json.loads(store.get(str(rank))) for rank in range(count)]
