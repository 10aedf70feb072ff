"""The accelerator of this process: CUDA with NCCL if CUDA is available, else CPU with gloo.

Megatron-core refers to CUDA literally (``torch.cuda.current_device()``, ``device="cuda"``, ``param.type() ==
"torch.cuda.FloatTensor"``). Without CUDA, :func:`activate` redirects these names to the CPU, in this process only; with
CUDA it redirects nothing. It must run before ``megatron`` is imported, so every entry point calls
``accelerator.activate()`` first.

Redirected without CUDA:

* ``torch.cuda.current_device/device_count/set_device/synchronize/...``, because Megatron initialises model parallelism
  only if ``device_count() > 0`` and allocates every buffer on ``current_device()``;
* tensor factories with ``device="cuda"``, ``Module.cuda`` and ``Tensor.cuda``, which return CPU tensors;
* ``Tensor.type()``, because gradient clipping and the bf16 optimizers compare it with ``"torch.cuda.…Tensor"``;
* the CUDA random state, replaced by the CPU generator so that Megatron's RNG tracker and checkpoints work;
* the copy of split sizes to the host in Megatron's dispatcher of tokens to experts, which takes only CUDA tensors.
"""

import contextlib
import functools
import importlib
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _device as torch_device_contexts

from megatron_camopd.errors import ConfigurationError

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "empty_like", "zeros_like")


@dataclass(frozen=True)
class Accelerator:
    """Device that this process computes on.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        backend: the torch.distributed backend, ``nccl`` or ``gloo``.
        device: the device of all tensors of the model.
    """

    kind: str
    backend: str
    device: torch.device

    def describe(self) -> str:
        """Return one line for the log."""
        if self.kind == "cuda":
            return f"accelerator: CUDA ({torch.cuda.get_device_name(self.device)}), NCCL"
        return f"accelerator: CPU, gloo, {torch.get_num_threads()} thread(s) per process (no CUDA device found)"


@functools.cache
def activate() -> Accelerator:
    """Detect the accelerator and, without CUDA, install the redirections; repeated calls change nothing."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's requirement for TP > 1
    _silence_library_warnings()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        return Accelerator("cuda", "nccl", torch.device("cuda", local_rank))
    _redirect_cuda_to_cpu()
    return Accelerator("cpu", "gloo", torch.device("cpu"))


def plain_arguments() -> dict[str, Any]:
    """Return the Megatron arguments for layers in plain torch, without fused kernels or Transformer Engine."""
    from megatron.core.transformer.enums import AttnBackend

    return {
        "transformer_impl": "local",
        "attention_backend": AttnBackend.unfused,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "no_persist_layer_norm": True,
        "apply_rope_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
        "tp_comm_overlap": False,
    }


def cpu_required_arguments() -> dict[str, Any]:
    """Return the Megatron arguments that a machine without CUDA requires; they are its defaults."""
    return plain_arguments() | {"distributed_backend": "gloo", "fp16": False}


def required_arguments() -> dict[str, Any]:
    """Return the Megatron arguments that this machine requires; they are its defaults.

    On CUDA, they switch off fusions that are on by default but whose compiled extension (of Apex or Transformer Engine)
    is not installed. Megatron itself would notice that late (gradient accumulation), in the first step (softmax), or by
    failing to build the model (RoPE). Transformer Engine layers are not replaced by local ones silently; see
    :func:`check_arguments`.
    """
    if current().kind == "cpu":
        return cpu_required_arguments()
    extensions = {
        "gradient_accumulation_fusion": _imports("fused_weight_gradient_mlp_cuda"),
        "masked_softmax_fusion": _imports("scaled_upper_triang_masked_softmax_cuda"),
        "apply_rope_fusion": has_transformer_engine(),
    }
    return {name: False for name, installed in extensions.items() if not installed}


def check_arguments(args: Namespace) -> None:
    """Check that this machine can run with the parsed Megatron arguments.

    Raises:
        ConfigurationError: a flag differs from :func:`required_arguments`, or asks for Transformer Engine layers while
            Transformer Engine is not installed.
    """
    machine = "without CUDA" if current().kind == "cpu" else "without that CUDA extension"
    for name, required in required_arguments().items():
        value = getattr(args, name)
        if value != required:
            flag, shown = "--" + name.replace("_", "-"), getattr(value, "name", value)
            wanted = getattr(required, "name", required)
            raise ConfigurationError(f"{flag} is {shown}, but a machine {machine} needs {wanted}; drop the flag")
    if args.transformer_impl != "local" and not has_transformer_engine():
        raise ConfigurationError(
            f"--transformer-impl is {args.transformer_impl}, but Transformer Engine is not installed: run `make setup "
            "EXTRAS=gpu`, or give --transformer-impl local (torch's attention and norms)"
        )


def has_transformer_engine() -> bool:
    """Return whether Megatron can import Transformer Engine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def current() -> Accelerator:
    """Return the accelerator of this process, and activate it if that has not happened yet."""
    return activate()


def peak_memory_bytes() -> int:
    """Return the peak memory of this process in bytes: of torch's allocator on CUDA, of the resident set on CPU."""
    if current().kind == "cuda":
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy ``tensor`` to host memory, page-locked if the accelerator is CUDA."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=current().kind == "cuda")
    return host.copy_(tensor.detach())


class CopyStream:
    """Stream for copies that overlap with computation on CUDA; on CPU copies are synchronous.

    Copies issued within ``with stream: ...`` start after the work that was queued before. :meth:`wait` makes the work
    that is queued afterwards wait for the copies.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if current().kind == "cuda" else None
        self._context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)

    def wait(self) -> None:
        """Make work that is queued from now on wait for the copies."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _imports(module: str) -> bool:
    """Return whether ``module`` can be imported; an extension that was built for another torch cannot."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _silence_library_warnings() -> None:
    """Suppress warnings that are meant for developers of Megatron and torch: optional packages and deprecations."""
    for message in ("[Aa]pex is not installed", "Transformer Engine", "torch.distributed is disabled"):
        warnings.filterwarnings("ignore", message=f".*{message}")
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # Megatron's sources contain invalid escape sequences; Python warns whenever it compiles them.
    warnings.filterwarnings("ignore", message=".*invalid escape sequence", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    for module in ("megatron.*", "torch.distributed.checkpoint.*"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    # "GPTModel is deprecated"; and without CUDA "CPU RNG state changed", because Megatron's RNG tracker then uses the
    # CPU generator.
    for name in ("megatron.core.models.gpt.gpt_model", "megatron.core.tensor_parallel.random"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _redirect_cuda_to_cpu() -> None:
    """Replace the functions of torch that refer to CUDA; see the module docstring."""
    _import_megatron_uncompiled()
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")

    # A new function for every name, because torch.compile keeps a table of these functions and rejects duplicates.
    def returning(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value() if callable(value) else value

    cuda.current_device, cuda.device_count = returning(cpu), returning(1)
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect", "set_stream"):
        setattr(cuda, name, returning(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, returning(0))
    cuda.memory_stats = returning(dict)
    cuda.get_rng_state = returning(torch.get_rng_state)
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.get_device_capability = returning((0, 0))
    cuda.get_device_properties = returning(SimpleNamespace(name="cpu", major=0, minor=0, multi_processor_count=1))
    cuda.Stream, cuda.Event = _NullStream, _NullEvent
    cuda.current_stream, cuda.default_stream = returning(_NullStream), returning(_NullStream)
    cuda.stream = returning(contextlib.nullcontext)

    # ``with torch.device(...)`` looks up factories in a set that torch builds once. Build it now, from the original
    # functions, which the redirected ones call.
    torch_device_contexts._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    module_class: Any = torch.nn.Module
    tensor_class: Any = torch.Tensor
    module_class.cuda = lambda self, *args, **kwargs: self
    tensor_class.cuda = lambda self, *args, **kwargs: self
    plain_type = tensor_class.type

    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = plain_type(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    tensor_class.type = cuda_type_name
    _redirect_megatron_rng()
    _redirect_token_dispatcher()


def _import_megatron_uncompiled() -> None:
    """Import Megatron while ``torch.compile`` does nothing.

    Megatron decorates its elementwise functions with ``torch.compile``. On CPU their first call would start a C++
    compiler, and importing torch's compiler alone doubles the import time.
    """
    compile_function: Any = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else (lambda function: function)
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_function


def _redirect_megatron_rng() -> None:
    """Give Megatron's RNG tracker the CPU generator in place of that of ``torch.cuda``."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _redirect_token_dispatcher() -> None:
    """Let Megatron's dispatcher of tokens to experts take the sizes of its exchanges from CPU tensors.

    It moves tensors of CUDA to the host as arrays of numpy. CPU tensors would stay tensors, which gloo does not take.
    """
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = move(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that it returns CPU tensors where CUDA tensors or pinned memory are asked for."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


class _NullStream:
    """Replacement of ``torch.cuda.Stream`` that does nothing, because CPU work runs in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return _NullEvent() if event is None else event


class _NullEvent:
    """Replacement of ``torch.cuda.Event`` that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True
