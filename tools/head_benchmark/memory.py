"""Peak extra memory of one call: the most that it used beyond what existed before it.

CUDA: the allocator's own peak. CPU: the growth of the process's resident set, whose recorded peak Linux resets on
request; where that is forbidden, a thread samples the resident set every millisecond. The resident set includes memory
that no allocator hook sees (work space of the matrix library), but it is exact only if freed memory goes back to the
system: :func:`return_freed_memory`.

One fp32 buffer of the weight's shape, for the weight's gradient, is not counted for any contestant. A contestant that
adds to a given buffer has it before the call. One that makes its own may reach its peak before or after it allocates
that gradient. Let ``frozen`` be the peak of the same call without the weight's gradient, and ``full`` the peak with it;
then

    extra = max(frozen, full - V H 4 bytes)

is right in both cases: a peak before the gradient exists is the same in both calls, a later one contains the buffer.
"""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def return_freed_memory() -> None:
    """Make glibc give every freed block of 64 KiB or more back to the system at once, from now on."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        libc.mallopt(M_TRIM_THRESHOLD, 2**16)


def method(device: torch.device) -> str:
    """Return how :func:`peak_growth` measures on this machine, for the report."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    if _reset_peak():
        return "peak resident set (VmHWM) of a fresh process"
    return "resident set of a fresh process, sampled" if STATUS.exists() else "not measured: no /proc"


def peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Run ``call``; return the largest growth of memory in use, in bytes, or None where it cannot be measured."""
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
    """Reset the recorded peak of the resident set to its present size; return False where that is forbidden."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    """Read a field of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _sampled_growth(call: Callable[[], object]) -> int:
    """Run ``call``; return the largest growth that a sampling thread sees, in bytes."""
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
