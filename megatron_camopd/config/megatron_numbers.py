"""Numbers of Megatron's flags that Megatron itself takes as they are, and what each of them may be."""

import math
import os
from argparse import Namespace
from collections.abc import Collection, Mapping

from megatron_camopd.config.settings import Range, above, at_least, flag_of
from megatron_camopd.errors import ConfigurationError

_FRACTION = Range(0, 1, open_high=True)
_LARGEST = 2**31 - 1  # seeds of numpy and counters of libraries end there or a little later

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        ("save_interval", "exit_interval", "exit_duration_in_mins", "log_interval", "distributed_timeout_minutes",
         "tensorboard_log_interval", "tensorboard_queue_size", "loss_scale_window", "hysteresis",
         "save_retain_interval", "lr_decay_iters", "lr_wsd_decay_iters", "decoder_first_pipeline_num_layers",
         "decoder_last_pipeline_num_layers"),
        at_least(1),
    ),
    "seed": Range(low=1, high=_LARGEST, words="must be at least 1"),
    "lr": Range(low=0, words="must be a number, 0 or more"),
    **dict.fromkeys(
        ("clip_grad", "weight_decay", "start_weight_decay", "end_weight_decay", "decoupled_lr", "decoupled_min_lr",
         "manual_gc_interval"),
        at_least(0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "sgd_momentum", "attention_dropout", "hidden_dropout"), _FRACTION),
    **dict.fromkeys(
        ("adam_eps", "loss_scale", "initial_loss_scale", "min_loss_scale", "init_method_std"), above(0)
    ),
}  # fmt: skip
"""Allowed values of Megatron's arguments, by name; None, where Megatron allows it, means "not given"."""


def check_ranges(args: Namespace) -> None:
    """Check the numbers of Megatron's flags against :data:`RANGES`.

    Raises:
        ConfigurationError: Names the flag, the value and what would be right.
    """
    for name, within in RANGES.items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and not within.contains(value):
            raise ConfigurationError(f"{flag_of(name)} {value}: {within.describe()}")


def check_finite(args: Namespace, given: Mapping[str, str], may_be_infinite: Collection[str]) -> None:
    """Check that all numbers on the command line are finite, and small enough for the libraries that count with them.

    Args:
        args: The parsed arguments.
        given: The flags on the command line as written, by argument name.
        may_be_infinite: Names of arguments whose value may be infinite.

    Raises:
        ConfigurationError: Names the flag, the value and what would be right.
    """
    for name, flag in given.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            allowed = isinstance(number, float) and math.isinf(number) and name in may_be_infinite
            if isinstance(number, float) and not math.isfinite(number) and not allowed:
                raise ConfigurationError(f"{flag} {number}: must be a finite number")
            if isinstance(number, int) and abs(number) > 2**62:
                raise ConfigurationError(f"{flag} {number}: is too large")


def check_environment() -> None:
    """Check the variables by which torchrun tells a process its place.

    Raises:
        ConfigurationError: one of them is no whole number, or this process's place is none of the world's.
    """
    places = {}
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        text = os.environ.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
            raise ConfigurationError(f"{name}={text!r} in the environment: must be a whole number, {least} or more")
        places[name] = int(text)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in places and size in places and places[rank] >= places[size]:
            raise ConfigurationError(f"{rank}={places[rank]} in the environment: must be below {size}={places[size]}")
