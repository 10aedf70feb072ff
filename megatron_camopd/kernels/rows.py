"""Choice of the back end for the row operations: Triton on CUDA, torch elsewhere."""

import functools
import importlib.util

from megatron_camopd.kernels import rows_torch
from megatron_camopd.kernels.row_operations import RowOperations


@functools.cache
def row_operations(device_type: str) -> RowOperations:
    """Return the back end for tensors on a device of this type."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        from megatron_camopd.kernels import rows_triton  # imported here: machines without CUDA may lack Triton

        return rows_triton
    return rows_torch
