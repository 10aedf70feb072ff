"""Peak extra memory of one call: what it needed at worst beyond what existed before it.

CUDA: the allocator's own peak. CPU: growth of the process's resident set, whose peak Linux resets on request; where
that is forbidden a thread samples it every millisecond. The resident set shows what no allocator hook does (scratch
space of the matrix library), but only if freed memory goes back to the system: :func:`return_freed_memory`.

The weight's gradient is nobody's cost: one fp32 buffer of the weight's shape is free. A contestant that adds to a given
buffer has it before the call. For one that makes its own, the peak may or may not fall into that tensor's life;
with ``frozen`` the peak of the same call without the weight's gradient and ``full`` with it,

    extra = max(frozen, full - V H 4 bytes)

is right in both cases: a peak before the gradient exists shows in both calls alike, a later one contains the buffer.
"""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def return_freed_memory() -> None:
    """From now on glibc gives every freed block of 64 KiB and more back to the system at once."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        libc.mallopt(M_TRIM_THRESHOLD, 2**16)


def method(device: torch.device) -> str:
    """How :func:`peak_growth` measures here, for the report."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    if _reset_peak():
        return "peak resident set (VmHWM) of a fresh process"
    return "resident set of a fresh process, sampled" if STATUS.exists() else "not measured: no /proc"


def peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory in use rises at most while ``call`` runs; None where it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not STATUS.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if _reset_peak():
        before = _status_bytes("VmRSS")
        call()
        return max(_status_bytes("VmHWM") - before, 0)
    return _sampled_growth(call)


def _reset_peak() -> bool:
    """Set the recorded peak of the resident set to its present size; False where that is not allowed."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _sampled_growth(call: Callable[[], object]) -> int:
    before = peak = _status_bytes("VmRSS")
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _status_bytes("VmRSS"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        call()
    finally:
        done.set()
        sampler.join()
    return max(peak, _status_bytes("VmRSS")) - before
