"""Restricted unpickling: a checkpoint holds pickles, and reading one must not run what somebody wrote into it.

torch reads the index of a distributed checkpoint (``.metadata``) and its non-tensor entries with plain ``pickle``,
which calls whatever a file names. Within :func:`restricted_unpickling` both go through an unpickler that finds only
what torch and Megatron write: tensors, dtypes, numpy arrays, argument namespaces, enumerations, records of DCP.
"""

import contextlib
import enum
import importlib
import pickle
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem

_DCP = "torch.distributed.checkpoint"
_ALLOWED: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "_codecs": "encode",
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list range set slice str tuple",
        "collections": "OrderedDict defaultdict deque",
        "datetime": "timedelta",
        "io": "BytesIO",
        "_io": "BytesIO",
        "numpy": "dtype ndarray",
        "numpy.dtypes": "UInt32DType",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "pathlib": "Path PosixPath PurePosixPath",
        "pathlib._local": "Path PosixPath PurePosixPath",
        "signal": "Signals Handlers",
        "torch": "Size Tensor device BFloat16Storage FloatStorage HalfStorage LongStorage IntStorage BoolStorage "
        "ByteStorage DoubleStorage UntypedStorage",
        "torch._utils": "_rebuild_tensor_v2 _rebuild_parameter",
        "torch.serialization": "_get_layout",
        "torch.storage": "TypedStorage UntypedStorage",
        "types": "SimpleNamespace",
        f"{_DCP}.filesystem": "_StorageInfo",
        f"{_DCP}.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
        f"{_DCP}.planner": "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType",
    }.items()
}


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that finds nothing but what checkpoints of torch and Megatron are made of."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function that a pickle names.

        Raises:
            UnpicklingError: it is not one that torch or Megatron writes.
        """
        if is_record(module, name) or _is_megatron_enum(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of Megatron holds")


@contextlib.contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Let torch read checkpoints by :class:`RestrictedUnpickler` meanwhile, whoever asks it to."""
    module: Any = types.ModuleType("restricted_pickle")
    vars(module).update({name: value for name, value in vars(pickle).items() if not name.startswith("__")})
    module.Unpickler, module.load = RestrictedUnpickler, _load
    torch_load, plain_pickle = torch.load, filesystem.pickle

    def load(f: Any, *args: Any, weights_only: bool | None = None, **options: Any) -> Any:
        if weights_only is False:
            options["pickle_module"] = module
        return torch_load(f, *args, weights_only=weights_only, **options)

    torch.load, filesystem.pickle = load, module
    try:
        yield
    finally:
        torch.load, filesystem.pickle = torch_load, plain_pickle


def _load(file: Any, **options: Any) -> Any:
    return RestrictedUnpickler(file, **options).load()


def is_record(module: str, name: str) -> bool:
    """Whether a pickle may name this: plain data, tensors, dtypes and the records of distributed checkpoints."""
    dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return dtype or name in _ALLOWED.get(module, ())


def _is_megatron_enum(module: str, name: str) -> bool:
    """Whether it is an enumeration of Megatron-core, such as those among the arguments."""
    if not module.startswith("megatron.core.") or "." in name:
        return False
    found = getattr(importlib.import_module(module), name, None)
    return isinstance(found, type) and issubclass(found, enum.Enum)
