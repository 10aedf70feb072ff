"""Exchange of values between the processes of one command before they have formed a process group.

It uses the key-value store at which torchrun's processes (or others with MASTER_ADDR and MASTER_PORT) meet anyway.
"""

import contextlib
import datetime
import json
import os
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_camopd.errors import ConfigurationError

_LIMIT = 2 * 3600.0
"""Seconds; hashing terabytes takes long. A process that ends with an error takes the others down through torchrun."""
_REMINDER = 60.0
_PARTING = datetime.timedelta(seconds=60)

_stores: list[Any] = []  # kept until the end: rank 0 may host the store in which the process group meets next
_rounds = 0


def process_number() -> int:
    """Return this process's number among those of the command (RANK), 0 if it runs alone."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return the number of processes of the command (WORLD_SIZE), 1 if it runs alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_launcher() -> None:
    """Check that a launcher has told this process where to meet the others.

    Raises:
        ConfigurationError: It has not.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise ConfigurationError(
            f"{missing[0]} is not set: start the command with torchrun --nproc-per-node N, or add --dry-run"
        )


def exchange(name: str, value: Any) -> list[Any]:
    """Return the JSON ``value`` of every process, in rank order; collective.

    Args:
        name: Name of the values, the same on all processes.
        value: This process's value.

    Raises:
        ConfigurationError: Another process has ended before it gave its value.
    """
    global _rounds
    if dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value)
        return gathered
    if process_count() == 1:
        return [value]
    try:
        if not _stores:
            _stores.append(next(rendezvous("env://", timeout=datetime.timedelta(seconds=_LIMIT)))[0])
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"camopd/{start}/{name}/{_rounds}", _stores[0])
        _rounds += 1
        store.set(str(process_number()), json.dumps(value))
        values = [json.loads(_wait_for(store, rank)) for rank in range(process_count())]
        store.set(f"read by {process_number()}", "")
        if process_number() == 0:  # it may hold the store, and end next
            with contextlib.suppress(dist.DistStoreError):
                store.wait([f"read by {rank}" for rank in range(process_count())], _PARTING)
        return values
    except dist.DistError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"another process of this command has ended, and says why ({' '.join(reason.split())[:120]})"
        ) from error


def _wait_for(store: Any, rank: int) -> bytes:
    """Return the value of process ``rank``; after a minute, say once that it is waited for."""
    began, said = time.monotonic(), False
    while not store.check([str(rank)]):
        waited = time.monotonic() - began
        if waited > _LIMIT:
            raise dist.DistStoreError(f"process {rank} gave no value within {_LIMIT:.0f} s")
        if waited > _REMINDER and not said:
            print(f"process {process_number()} waits for process {rank}, which still reads its inputs", flush=True)
            said = True
        time.sleep(0.01 if waited < 1 else 0.2)
    value: bytes = store.get(str(rank))
    return value
