"""Let Megatron's checkpoint loader read one checkpoint, whatever the tracker file of its directory says."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_camopd.checkpoint.directory import CheckpointLocation


@contextmanager
def arguments(args: Namespace, **values: Any) -> Iterator[None]:
    """Set arguments for the duration of the block: Megatron's loader reads its options from the global ones."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


@contextmanager
def reading(args: Namespace, location: CheckpointLocation) -> Iterator[None]:
    """Let Megatron's loader read the checkpoint at ``location`` during the block.

    The loader takes the iteration from ``--ckpt-step`` or else from the tracker, and ends the process if the tracker is
    damaged. A run may go on from an older checkpoint than the tracker names, because the newest is damaged.
    """
    from megatron.training import checkpointing  # imported here: accelerator.activate() comes first

    read_tracker = checkpointing.read_metadata
    checkpointing.read_metadata = lambda _: (location.iteration or 0, location.iteration is None)
    try:
        with arguments(args, ckpt_step=location.iteration):
            yield
    finally:
        checkpointing.read_metadata = read_tracker
