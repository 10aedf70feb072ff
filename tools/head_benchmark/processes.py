"""Run a function in this process, or in new ones that form a tensor-parallel group."""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

GROUP_TIMEOUT = datetime.timedelta(minutes=30)  # a rank may wait for the first one's compilation


def run_group(size: int, threads: int, device_type: str, fresh: bool, function: Callable[..., Any], *args: Any) -> Any:
    """``function(device, group, *args)`` on ``size`` processes, and what the first one returned.

    One process that need not be ``fresh`` is this one. ``group`` is None for one process, else gloo (CPU) or NCCL, with
    one GPU a rank. The function, its arguments and its result are pickled. Raises what torch.multiprocessing raises for
    a process that ends with an error or a signal.
    """
    if size == 1 and not fresh:
        torch.set_num_threads(threads)
        return function(torch.device(device_type), None, *args)
    with tempfile.TemporaryDirectory(prefix="benchmark_head_") as folder:
        torch.multiprocessing.spawn(_member, (size, threads, device_type, folder, function, args), nprocs=size)
        return torch.load(Path(folder) / "result", weights_only=False)


def _member(
    rank: int, size: int, threads: int, device_type: str, folder: str, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(threads)
    device, group = torch.device(device_type), None
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if size > 1:
        backend = "nccl" if device_type == "cuda" else "gloo"
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
        group = dist.group.WORLD
    result = function(device, group, *args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()
