"""What vLLM does to the process it lives in, and how the trainer gets its process back: all of it in this file.

vLLM is written to own its process. In the trainer's, :func:`import_vllm` imports it, and everything
that it runs, runs inside ``with vllm_context():``. What it would otherwise leave behind, and what is done about it:

* the random states of Python, numpy and torch: building an engine seeds them, sampling advances torch's even where
  every request has a seed of its own. Saved and put back, since exact resume depends on them;
* functions of torch: without CUDA it replaces ``torch.set_num_threads``, parts of ``torch.cuda`` and
  ``torch.accelerator`` and two methods of ``torch.Tensor`` by functions that do nothing; with CUDA it wraps
  ``torch.cuda.set_stream``. It sees its own while it runs, the trainer sees torch's;
* the current CUDA stream: it makes one of its own and leaves it current. Each gets its own back;
* the environment: it sets some ten variables, LOCAL_WORLD_SIZE and LD_PRELOAD (which would reach every process
  started later) among them. It reads them while it is imported and built; put back after both;
* the garbage collector: it freezes all objects alive, the trainer's too, which would then never be collected;
* memory policy: without CUDA it binds the whole process to one NUMA node, strictly. Left out;
* the default process group: collecting an ``LLM`` destroys it with all of Megatron's groups, and so does the end of the
  interpreter, possibly while other ranks still talk; without CUDA, finalisers of its layers then call into torch, which
  is gone: a segmentation fault. :func:`never_collect` makes an engine immortal;
* shared memory of tensor-parallel ranks, which a killed process would leave in /dev/shm: the names are given back as
  soon as all ranks have mapped it;
* its console log and warnings: off below errors. VLLM_LOGGING_LEVEL, if set, is obeyed instead.
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: tensors and functions are handed to it
    "VLLM_NO_USAGE_STATS": "1",  # a thread that reports to vLLM's makers
    "HF_HUB_OFFLINE": "1",  # the model folder is complete
}

_vllm_functions: dict[tuple[int, str], Any] = {}  # torch's functions as vLLM last left them
_vllm_streams: list[Any] = []  # the CUDA stream that vLLM last ran on, if any


def import_vllm() -> ModuleType:
    """The package ``vllm``. Errors: ConfigurationError where it is missing or cannot run on this accelerator."""
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
                importlib.import_module("vllm._C")  # vLLM itself goes on without, and fails later
            importlib.import_module("vllm.entrypoints.llm")
    except ImportError as error:
        hint = " (system package libnuma1)" if "libnuma" in str(error) else ""
        raise ConfigurationError(f"{flag}: vllm cannot be imported ({error}){hint}; {_INSTALL}") from error
    return vllm


@contextlib.contextmanager
def construction(shared_memory: str) -> Iterator[None]:
    """Surroundings in which an engine is built.

    ``shared_memory``: a name that the ranks of this run share with no other run of this machine. Without CUDA vLLM's
    tensor-parallel ranks meet under it in /dev/shm; its own name is the same for every run.
    """
    executor = importlib.import_module("vllm.v1.executor.uniproc_executor").ExecutorWithExternalLauncher
    place = executor._distributed_args
    place_in_world = {"RANK": str(dist.get_rank()), "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
    try:
        # What follows the last colon names the shared memory; the address itself is for a process without groups.
        executor._distributed_args = lambda self: (f"env://:{shared_memory}", *place(self)[1:])
        with vllm_context(_environment_of_vllm() | place_in_world), _without_memory_policy():
            yield
            _unlink_message_queue()
    finally:
        executor._distributed_args = place
        gc.unfreeze()
        for path in Path("/dev/shm").glob(f"{shared_memory}*"):  # mapped by now; a killed process would leave it
            path.unlink(missing_ok=True)


def _unlink_message_queue() -> None:
    """Give the name of the tensor-parallel group's shared memory back; its ranks have mapped it."""
    queue = importlib.import_module("vllm.distributed.parallel_state").get_tp_group().mq_broadcaster
    if queue is not None and queue.buffer.is_creator:
        queue.buffer.shared_memory.unlink()


def _environment_of_vllm() -> dict[str, str]:
    if "VLLM_LOGGING_LEVEL" in os.environ:
        return dict(_ENVIRONMENT)
    return _ENVIRONMENT | {"VLLM_CONFIGURE_LOGGING": "0"}  # else it takes over Python's log records


def never_collect(llm: Any) -> None:
    """Never let the engine ``llm`` be collected, not even while the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(llm))
    llm.llm_engine.engine_core._finalizer.atexit = False


@contextlib.contextmanager
def vllm_context(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run vLLM's code within; on leaving, the process is the trainer's again.

    ``environment``: variables to set meanwhile; then all changes to the environment are undone as well.
    """
    with contextlib.ExitStack() as stack:
        if environment is not None:
            stack.enter_context(_environment(environment))
        stack.enter_context(_random_states())
        stack.enter_context(_torch_functions())
        stack.enter_context(_stream())  # after the functions: vLLM's set_stream must see it
        stack.enter_context(warnings.catch_warnings())
        # Of torch's to vLLM's makers.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.reduce_op")
        if accelerator.current().kind == "cpu":
            # Eager engines too compile small functions, with a C++ compiler that need not be there.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # overrules the size of the cache that it is given
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
    """vLLM's replacements within, torch's own (and its number of threads) after."""
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
    """vLLM's CUDA stream within, which it makes once and remembers; the trainer's after."""
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
    """Make ``namespace`` what it was, and remember the functions that were changed."""
    for name, value in list(vars(namespace).items()):
        old = before.get(name, _MISSING)
        if value is old or not callable(value):  # modules of torch that were imported only now stay
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
