"""Setting of every test: one thread, no network, the order of the folders, time limits, and skips.

The folders run from fast to slow, so that a plain mistake shows within seconds. A test without a
``@pytest.mark.timeout`` of its own gets its folder's limit, in seconds; a collective that hangs on one of two
processes would otherwise stop the whole run. Tests marked ``gpu`` or ``vllm`` are skipped where those are missing.
"""

import ctypes.util
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before anything imports torch: two processes with a thread pool each are slower than two single threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a test needs is in the repository or made by the test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test writes to the user's cache, nor does a process that a test starts: all of them inherit this. vLLM keeps its
# own, which saves compilation.
os.environ.setdefault("VLLM_CACHE_ROOT", os.path.join(os.path.expanduser("~"), ".cache", "vllm"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="camopd-test-cache-")

import pytest

TESTS = Path(__file__).parent
CACHE = Path(os.environ["XDG_CACHE_HOME"])
TIME_LIMITS = {
    "unit": 120,
    "tools": 120,
    "numerics": 180,
    "examples": 1200,
    "golden": 600,
    "distributed": 600,
    "integration": 1200,
}


def pytest_unconfigure() -> None:
    """Remove the cache of the tests."""
    shutil.rmtree(CACHE, ignore_errors=True)


def _folder(item: pytest.Item) -> str:
    parts = item.path.relative_to(TESTS).parts
    return parts[0] if len(parts) > 1 else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder, keeping each folder's own order; set time limits; skip what this machine cannot run."""
    order = {folder: place for place, folder in enumerate(TIME_LIMITS)}
    items.sort(key=lambda item: order.get(_folder(item), len(order)))
    for item in items:
        limit = TIME_LIMITS.get(_folder(item))
        if limit is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit))
    _skip_marked(items, "gpu", _has_cuda, "needs a CUDA device")
    _skip_marked(items, "vllm", _has_vllm, "needs vllm (make setup EXTRAS=vllm) and, without CUDA, libnuma")


def _skip_marked(items: list[pytest.Item], marker: str, is_possible: Callable[[], bool], reason: str) -> None:
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked and not is_possible():
        if marker == "vllm" and os.environ.get("CAMOPD_REQUIRE_VLLM"):
            raise pytest.UsageError(f"`make test` tests with vLLM, but this machine {reason}")
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_vllm() -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    return _has_cuda() or ctypes.util.find_library("numa") is not None


def _has_cuda() -> bool:
    import torch  # only when a test asks: the import takes seconds

    return torch.cuda.is_available()
