"""Isolation of vLLM within the trainer's process: vLLM's changes to the process are undone when its code returns.

vLLM is written to have a process for itself. :func:`import_vllm` imports it, :func:`construction` surrounds the
building of an engine, and all other code of vLLM runs inside ``with vllm_context():``. vLLM changes the following:

* Random states of Python, numpy and torch. Building an engine seeds them, and sampling advances torch's even if every
  request has a seed of its own. They are saved and restored, because exact resume depends on them.
* Functions of torch. Without CUDA, vLLM replaces ``torch.set_num_threads``, parts of ``torch.cuda`` and
  ``torch.accelerator`` and two methods of ``torch.Tensor`` by functions that do nothing; with CUDA it wraps
  ``torch.cuda.set_stream``. vLLM sees its replacements while it runs, the trainer sees torch's functions.
* The current CUDA stream. vLLM makes a stream and leaves it current. vLLM runs on its stream, the trainer on its own.
* Environment variables. vLLM sets about ten, among them LOCAL_WORLD_SIZE, and LD_PRELOAD, which would act on every
  process started later. It reads them while it is imported and built; afterwards they are restored.
* The garbage collector. vLLM freezes all living objects, so the trainer's would never be collected. They are unfrozen.
* Memory policy. Without CUDA, vLLM binds the whole process strictly to one NUMA node. This is skipped.
* The default process group. Collecting an ``LLM`` destroys it with all of Megatron's groups, and so does the end of the
  interpreter, possibly while other ranks still communicate. Without CUDA, finalisers of vLLM's layers then call into
  torch after it was unloaded, which is a segmentation fault. :func:`never_collect` keeps an engine alive for good.
* Shared memory of tensor-parallel ranks, which a killed process would leave in /dev/shm. Its names are removed as soon
  as all ranks have mapped it.
* Console log and warnings. Only errors are shown, unless VLLM_LOGGING_LEVEL is set.
"""

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.distributed as dist

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator

_INSTALL = "run `make setup EXTRAS=vllm`"
_NAMESPACES: tuple[Any, ...] = (torch, torch.cuda, torch.accelerator, torch.Tensor)
_MISSING = object()
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in this process, which tensors and functions can reach
    "VLLM_NO_USAGE_STATS": "1",  # no thread that reports usage to the vLLM project
    "HF_HUB_OFFLINE": "1",  # the model folder has all that is needed
}

_vllm_functions: dict[tuple[int, str], Any] = {}  # torch's functions as vLLM last left them
_vllm_streams: list[Any] = []  # the CUDA stream that vLLM last ran on, if any


def import_vllm() -> ModuleType:
    """Import and return the package ``vllm``.

    Raises:
        ConfigurationError: vLLM is missing or cannot run on this accelerator.
    """
    flag = "--rollout-engine vllm"
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with vllm_context(_environment_of_vllm()):
            vllm = importlib.import_module("vllm")
            platform = importlib.import_module("vllm.platforms").current_platform
            wanted = "cuda" if accelerator.current().kind == "cuda" else "cpu"
            if platform.device_type != wanted:
                raise ConfigurationError(
                    f"{flag}: the installed vllm runs on {platform.device_type or 'no device of this machine'}, the "
                    f"trainer on {wanted}; {_INSTALL}"
                )
            if wanted == "cpu":
                importlib.import_module("vllm._C")  # without it vLLM would go on and fail later
            importlib.import_module("vllm.entrypoints.llm")
    except ImportError as error:
        hint = " (system package libnuma1)" if "libnuma" in str(error) else ""
        raise ConfigurationError(f"{flag}: vllm cannot be imported ({error}){hint}; {_INSTALL}") from error
    return vllm


@contextlib.contextmanager
def construction(shared_memory: str) -> Iterator[None]:
    """Build a vLLM engine within this context.

    Args:
        shared_memory: Name of the shared memory in /dev/shm through which vLLM's tensor-parallel ranks communicate
            without CUDA: the same on all ranks of this run, and different from that of every other run on the machine.
            vLLM's own name would be the same for every run.
    """
    executor = importlib.import_module("vllm.v1.executor.uniproc_executor").ExecutorWithExternalLauncher
    place = executor._distributed_args
    place_in_world = {"RANK": str(dist.get_rank()), "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
    try:
        # vLLM names the shared memory by what follows the last colon, and ignores the address where groups exist.
        executor._distributed_args = lambda self: (f"env://:{shared_memory}", *place(self)[1:])
        with vllm_context(_environment_of_vllm() | place_in_world), _without_memory_policy():
            yield
            _unlink_message_queue()
    finally:
        executor._distributed_args = place
        gc.unfreeze()
        # All ranks have mapped it by now; a process that is killed later would leave it behind.
        for path in Path("/dev/shm").glob(f"{shared_memory}*"):
            path.unlink(missing_ok=True)


def _unlink_message_queue() -> None:
    """Remove the name of the tensor-parallel group's shared memory, which all its ranks have mapped."""
    queue = importlib.import_module("vllm.distributed.parallel_state").get_tp_group().mq_broadcaster
    if queue is not None and queue.buffer.is_creator:
        queue.buffer.shared_memory.unlink()


def _environment_of_vllm() -> dict[str, str]:
    if "VLLM_LOGGING_LEVEL" in os.environ:
        return dict(_ENVIRONMENT)
    return _ENVIRONMENT | {"VLLM_CONFIGURE_LOGGING": "0"}  # otherwise vLLM changes Python's log records


def never_collect(llm: Any) -> None:
    """Keep the engine ``llm`` from ever being collected, even while the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(llm))
    llm.llm_engine.engine_core._finalizer.atexit = False


@contextlib.contextmanager
def vllm_context(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run vLLM's code within this context, and undo its changes to the process on leaving.

    Args:
        environment: Environment variables to set within. If given, all changes to the environment are undone as well.
    """
    with contextlib.ExitStack() as stack:
        if environment is not None:
            stack.enter_context(_environment(environment))
        stack.enter_context(_random_states())
        stack.enter_context(_torch_functions())
        stack.enter_context(_stream())  # after the functions: it must go through vLLM's set_stream
        stack.enter_context(warnings.catch_warnings())
        # A deprecation warning of torch that only vLLM's authors can act on.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.reduce_op")
        if accelerator.current().kind == "cpu":
            # Even eager engines compile small functions, which needs a C++ compiler that may be missing.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the cache size given to the engine
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    python, arrays, tensors = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if accelerator.current().kind == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.set_rng_state(tensors)
        if device is not None:
            torch.cuda.set_rng_state(device)


@contextlib.contextmanager
def _torch_functions() -> Iterator[None]:
    """Install vLLM's replacements of torch's functions within; restore torch's own and its thread count after."""
    before = [dict(vars(namespace)) for namespace in _NAMESPACES]
    threads = torch.get_num_threads()
    for (number, name), value in _vllm_functions.items():
        setattr(_NAMESPACES[number], name, value)
    try:
        yield
    finally:
        for number, namespace in enumerate(_NAMESPACES):
            _put_back(number, namespace, before[number])
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _stream() -> Iterator[None]:
    """Make vLLM's CUDA stream current within, if it has made one; make the trainer's current again after."""
    if accelerator.current().kind != "cuda":
        yield
        return
    ours = torch.cuda.current_stream()
    for theirs in _vllm_streams:
        theirs.wait_stream(ours)
        torch.cuda.set_stream(theirs)
    try:
        yield
    finally:
        theirs = torch.cuda.current_stream()
        ours.wait_stream(theirs)
        _vllm_streams[:] = [theirs]
        torch.cuda.set_stream(ours)


def _put_back(number: int, namespace: Any, before: Mapping[str, Any]) -> None:
    """Restore ``namespace`` to ``before``, and remember the functions that vLLM has changed in it."""
    for name, value in list(vars(namespace).items()):
        old = before.get(name, _MISSING)
        if value is old or not callable(value):  # what is no function stays, such as submodules just imported
            continue
        _vllm_functions[number, name] = value
        if old is _MISSING:
            delattr(namespace, name)
        else:
            setattr(namespace, name, old)


@contextlib.contextmanager
def _without_memory_policy() -> Iterator[None]:
    if accelerator.current().kind != "cpu":
        yield
        return
    operators: Any = torch.ops._C
    bind = operators.init_cpu_memory_env
    operators.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        operators.init_cpu_memory_env = bind
