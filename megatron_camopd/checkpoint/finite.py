"""Check that weights are finite, which a conversion does as it copies them.

One NaN in a matrix makes every logit of a model NaN: training would end at its first step, hours after the conversion.
The check reads each value once, in the processor's cache or close to it, and allocates nothing.
"""

import math

import torch

from megatron_camopd.errors import ConfigurationError


def check_finite(values: torch.Tensor, *, where: str, first_row: int = 0) -> None:
    """Check that all of ``values`` (any shape, a floating-point dtype) are finite.

    Args:
        values: The weights.
        where: The file or folder and the tensor, for the error text, as in "a.safetensors: tensor x".
        first_row: Row of the tensor with which ``values`` begin.

    Raises:
        ConfigurationError: One of them is NaN or infinite; the line names the first.
    """
    if not _all_finite(values):
        raise ConfigurationError(f"{where} holds {_first(values, values, first_row)}; expected finite weights")


def cast_finite(
    values: torch.Tensor, dtype: torch.dtype, *, where: str, reason: str, first_row: int = 0
) -> torch.Tensor:
    """Return finite ``values`` in ``dtype``, and check that none of them is too large for it.

    Args:
        values: The weights, which are finite.
        dtype: The dtype to return.
        where: The file or folder and the tensor, for the error text.
        reason: What chose ``dtype``, for the error text, as in "--dtype".
        first_row: Row of the tensor with which ``values`` begin.

    Raises:
        ConfigurationError: A value becomes infinite in ``dtype``; the line names the first.
    """
    if values.dtype == dtype:
        return values
    cast = values.to(dtype)
    if not _all_finite(cast):
        name = str(dtype).removeprefix("torch.")
        raise ConfigurationError(
            f"{where} holds {_first(values, cast, first_row)}, which {name} (by {reason}) cannot hold; "
            "expected smaller weights or another dtype"
        )
    return cast


def _all_finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    # Both are NaN if any value is; ``isfinite`` takes twenty times as long.
    smallest, largest = values.aminmax()
    return math.isfinite(smallest) and math.isfinite(largest)


def _first(values: torch.Tensor, judged: torch.Tensor, first_row: int) -> str:
    """Return value and place of the first of ``values`` that is not finite in ``judged``, as "nan at [3, 0]"."""
    place = (~judged.isfinite()).nonzero()[0].tolist()
    value = values[tuple(place)].item()
    if place:
        place[0] += first_row
    return f"{value:g} at {place}"
