"""Counter-based random numbers: a pure function of seed and counters, without the state of a generator.

A random number is the hash of its counters (seed, step, sample, position, ...). Every rank computes those it needs, and
they do not depend on the parallel layout, the order of computation, or restarts.
"""

import torch
from torch import Tensor

_INT64_MASK_30 = (1 << 34) - 1  # the bits that a logical shift right by 30 leaves; torch's shift copies the sign bit
_INT64_MASK_27 = (1 << 37) - 1
_INT64_MASK_31 = (1 << 33) - 1
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(state: Tensor) -> Tensor:
    """Mix the bits of ``state`` (int64) elementwise by one step of SplitMix64 (Steele, Lea & Flood 2014)."""
    state = state + _GOLDEN
    state = (state ^ ((state >> 30) & _INT64_MASK_30)) * _MIX_1
    state = (state ^ ((state >> 27) & _INT64_MASK_27)) * _MIX_2
    return state ^ ((state >> 31) & _INT64_MASK_31)


def hash_counters(seed: int, *counters: Tensor | int, device: torch.device | None = None) -> Tensor:
    """Return 64 random bits (int64) for each element of the broadcast ``counters``; the order of counters matters."""
    key = mix(torch.tensor(seed, dtype=torch.int64, device=device))
    for counter in counters:
        key = mix(key ^ counter)
    return key


def uniform(bits: Tensor) -> Tensor:
    """Convert 64 random ``bits`` to a uniform float64 strictly between 0 and 1: (k + 1/2) / 2^52 from the upper 52."""
    return ((bits >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)
