"""CUDA with NCCL where there is CUDA, else CPU with gloo: the only place that knows the difference.

Megatron-core names CUDA literally (``torch.cuda.current_device()``, ``device="cuda"``, ``param.type() ==
"torch.cuda.FloatTensor"``). On a machine without CUDA :func:`activate` redirects exactly those names to the
CPU, in this process only; on a machine with CUDA it changes nothing. It must run before ``megatron`` is
imported: every entry point calls ``accelerator.activate()`` first.

What is redirected without CUDA, and why each is needed:

* ``torch.cuda.current_device/device_count/set_device/synchronize/...``: Megatron initialises model
  parallelism only where ``device_count() > 0`` and builds every buffer on ``current_device()``;
* tensor factories called with ``device="cuda"``, ``Module.cuda``, ``Tensor.cuda``: return CPU tensors;
* ``Tensor.type()``: gradient clipping and the bf16 optimizers compare it with ``"torch.cuda.…Tensor"``;
* the CUDA random state: the CPU generator stands in, so that Megatron's RNG tracker and checkpoints work.
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
    """What this process computes on. ``backend`` is the torch.distributed backend, ``device`` where tensors live."""

    kind: str
    backend: str
    device: torch.device

    def describe(self) -> str:
        """One line for the log."""
        if self.kind == "cuda":
            return f"accelerator: CUDA ({torch.cuda.get_device_name(self.device)}), NCCL"
        return f"accelerator: CPU, gloo, {torch.get_num_threads()} thread(s) per process (no CUDA device found)"


@functools.cache
def activate() -> Accelerator:
    """Detect the accelerator and, without CUDA, install the redirections. Only the first call does anything."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's requirement for TP > 1
    _silence_library_warnings()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        return Accelerator("cuda", "nccl", torch.device("cuda", local_rank))
    _redirect_cuda_to_cpu()
    return Accelerator("cpu", "gloo", torch.device("cpu"))


def plain_arguments() -> dict[str, Any]:
    """Megatron arguments, by name, under which its layers are plain torch: no fused kernel, no Transformer Engine."""
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
    """Megatron arguments that a machine without CUDA needs, by name: set as defaults there, and not negotiable."""
    return plain_arguments() | {"distributed_backend": "gloo", "fp16": False}


def required_arguments() -> dict[str, Any]:
    """Megatron arguments that this machine needs, by name: set as defaults, and not negotiable.

    On CUDA these are the fusions, on by default, whose compiled extension is not installed: Apex's or Transformer
    Engine's. Megatron's own check comes late (gradient accumulation), in the first step (softmax), or fails the
    build (RoPE). The layers themselves are not replaced in silence: see :func:`check_arguments`.
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
    """Compare parsed Megatron arguments with what this machine can run.

    Errors: ConfigurationError naming the flag that differs from :func:`required_arguments`, or Transformer Engine
    layers where that is not installed.
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
            "EXTRAS=gpu`, or give --transformer-impl local (plain attention: memory grows with the length's square)"
        )


def has_transformer_engine() -> bool:
    """Whether Megatron found a Transformer Engine that it can import."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def current() -> Accelerator:
    """The accelerator of this process; activates it when nothing has yet."""
    return activate()


def peak_memory_bytes() -> int:
    """Highest memory of this process so far: on CUDA of the allocator, on CPU of the resident set."""
    if current().kind == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` in host memory; page-locked where a CUDA device will read it back."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=current().kind == "cuda")
    return host.copy_(tensor.detach())


class CopyStream:
    """Copies that run beside the computation on CUDA, and at once on CPU.

    ``with stream: ...`` issues copies after the work queued so far; :meth:`wait` makes the computation that
    follows wait for them.
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
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _imports(module: str) -> bool:
    """Whether ``module`` is there and fits: one that was built for another torch fails to load."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _silence_library_warnings() -> None:
    """What Megatron and torch tell each other's developers: optional packages, functions on their way out."""
    for message in ("[Aa]pex is not installed", "Transformer Engine", "torch.distributed is disabled"):
        warnings.filterwarnings("ignore", message=f".*{message}")
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # Megatron's sources have such strings; Python says so wherever it compiles them anew.
    warnings.filterwarnings("ignore", message=".*invalid escape sequence", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    for module in ("megatron.*", "torch.distributed.checkpoint.*"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    # "GPTModel is deprecated"; and, without CUDA, "CPU RNG state changed" (its tracker runs on that generator).
    for name in ("megatron.core.models.gpt.gpt_model", "megatron.core.tensor_parallel.random"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _redirect_cuda_to_cpu() -> None:
    _import_megatron_uncompiled()
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")

    # One new function per name: torch's compiler keeps a table of these functions and refuses shared ones.
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

    # ``with torch.device(...)`` recognises factories by identity, from a set that it makes once: make it from the
    # original functions, which the redirected ones call.
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


def _import_megatron_uncompiled() -> None:
    """Import Megatron with ``torch.compile`` as identity.

    Its elementwise functions are decorated with ``torch.compile`` at import; on CPU that would start a C++
    compiler at their first call, and loading the compiler stack alone doubles the import time.
    """
    compile_function: Any = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else (lambda function: function)
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_function


def _redirect_megatron_rng() -> None:
    """Megatron's tracker reads and writes generators of ``torch.cuda``; give it the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
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
    """Stands in for ``torch.cuda.Stream``: CPU work is already ordered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event


class _NullEvent:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True
