"""Random numbers that are a function of where they are used, not of a generator's state.

A number is the hash of its counters - seed, step, sample, position, ... - so every rank computes those it needs, and
neither the parallel layout, nor the order of work, nor a restart can change one.
"""

import torch
from torch import Tensor

_INT64_MASK_30 = (1 << 34) - 1  # what remains of 64 bits after a shift by 30; arithmetic shifts smear the sign
_INT64_MASK_27 = (1 << 37) - 1
_INT64_MASK_31 = (1 << 33) - 1
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): int64 -> well-mixed int64, elementwise."""
    state = state + _GOLDEN
    state = (state ^ ((state >> 30) & _INT64_MASK_30)) * _MIX_1
    state = (state ^ ((state >> 27) & _INT64_MASK_27)) * _MIX_2
    return state ^ ((state >> 31) & _INT64_MASK_31)


def hash_counters(seed: int, *counters: Tensor | int, device: torch.device | None = None) -> Tensor:
    """64 mixed bits (int64) for every combination of ``counters``, which broadcast; their order matters."""
    key = mix(torch.tensor(seed, dtype=torch.int64, device=device))
    for counter in counters:
        key = mix(key ^ counter)
    return key


def uniform(bits: Tensor) -> Tensor:
    """float64 strictly between 0 and 1 from 64 ``bits``: 52 of them, centred in their cells."""
    return ((bits >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)
