"""Function calls in this process, or in new ones that form a tensor-parallel group."""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

GROUP_TIMEOUT = datetime.timedelta(minutes=30)  # a rank may have to wait while another compiles kernels


def run_group(size: int, threads: int, device_type: str, fresh: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(device, group, *args)`` on ``size`` processes; return the result of the first.

    A single process that need not be ``fresh`` is this one. For new processes, the function, its arguments and its
    result are pickled. ``group`` is None for one process, else gloo (CPU) or NCCL, with one GPU per rank.

    Raises:
        torch.multiprocessing.ProcessExitedException: A process was ended by a signal.
        torch.multiprocessing.ProcessRaisedException: A process raised an error.
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
    """Run the function on one rank; the first rank writes the result to ``folder``."""
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
