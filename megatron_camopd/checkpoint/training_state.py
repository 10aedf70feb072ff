"""The state that a training run saves and restores: Megatron's checkpoint with the CaMOPD state inside.

Model, optimizer, learning-rate schedule and RNG are Megatron's (torch_dist, resharded at load). The CaMOPD state -
the settings that decide what the next step computes, the teachers' paths, the place in every prompt stream - is
a small JSON text carried as ``args.camopd_state`` in the same checkpoint, so the two can never disagree. The
tracker file is written after all of it.
"""

import contextlib
import json
import logging
import os
import pickle
import queue
import re
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from megatron.training import checkpointing
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from torch.distributed.checkpoint import CheckpointException

from megatron_camopd.checkpoint.assets import CONFIG, assets_dir, copy_assets
from megatron_camopd.checkpoint.checksums import SUMS, HashingFile, hash_files, write_checksums
from megatron_camopd.checkpoint.directory import CheckpointLocation
from megatron_camopd.checkpoint.expert_optimizers import any_expert_parallelism
from megatron_camopd.checkpoint.megatron_reader import arguments, reading
from megatron_camopd.checkpoint.origin import BEGUN
from megatron_camopd.checkpoint.unpickling import restricted_unpickling
from megatron_camopd.errors import ConfigurationError, SaveError
from megatron_camopd.runtime.collectives import first_problem
from megatron_camopd.runtime.startup import quiet_megatron

_PROBE_BYTES = 1 << 24


def read_state(args: Namespace) -> dict[str, Any] | None:
    """Return the state of the run that is continued, in its checkpoint or from its beginning, or None if it is new."""
    result: dict[str, Any] | None = None if args.camopd_state is None else json.loads(args.camopd_state)
    return result


@contextmanager
def comparing_state(args: Namespace, state: dict[str, Any] | None) -> Iterator[None]:
    """Name the file when what a run has noted of itself has another form than this program writes.

    Raises:
        ConfigurationError: It has.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        if state is None:
            raise
        where = args.resumed.folder if args.resume else Path(args.save) / BEGUN
        raise ConfigurationError(
            f"--save {args.save}: what {where.name} notes of the run has another form than this version writes "
            f"({type(error).__name__}: {' '.join(str(error).split())[:80]}); it is damaged, or of another version"
        ) from error


def load_weights(
    args: Namespace, chunks: Sequence[MegatronModule], location: CheckpointLocation, optimizer: Any = None
) -> None:
    """Load model weights alone from a checkpoint into ``chunks``; collective.

    ``optimizer`` takes over the new weights as its main parameters (mixed precision).

    Raises:
        ConfigurationError: The checkpoint is damaged, or a weight is not finite.
    """
    directory = str(location.directory)
    weights_only = arguments(args, finetune=True, no_load_optim=True, no_load_rng=True, load=directory)
    with weights_only, reading(args, location), _readable(location), restricted_unpickling(), quiet_megatron(args):
        load_checkpoint(list(chunks), optimizer, None, strict=True)
    _check_loaded(chunks, location)


def load_training(args: Namespace, chunks: Sequence[MegatronModule], optimizer: Any, scheduler: Any) -> int:
    """Restore everything that Megatron keeps from the resumed checkpoint; returns the number of steps done. Collective.

    Raises:
        ConfigurationError: The checkpoint is damaged, or a weight is not finite.
    """
    location = args.resumed
    resuming = arguments(args, finetune=False, load=str(location.directory))
    with (
        resuming, reading(args, location), _readable(location), restricted_unpickling(), _torch_adam_loads(optimizer),
        any_expert_parallelism(optimizer), quiet_megatron(args),
    ):  # fmt: skip
        iteration, _ = load_checkpoint(list(chunks), optimizer, scheduler, strict=True)
    _check_loaded(chunks, location)
    return int(iteration)


def not_finite(chunks: Sequence[MegatronModule]) -> str | None:
    """Return the name of the first weight on any rank that holds NaN or infinity, or None. Collective."""
    bad = (
        name
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if not bool(torch.isfinite(parameter.detach()).all())
    )
    return first_problem(next(bad, None))


def _check_loaded(chunks: Sequence[MegatronModule], location: CheckpointLocation) -> None:
    name = not_finite(chunks)
    if name is not None:
        raise ConfigurationError(
            f"{location.folder}: weight {name} holds NaN or infinity; give a checkpoint with finite weights"
        )


@contextmanager
def _torch_adam_loads(optimizer: Any) -> Iterator[None]:
    """Make Megatron's distributed optimizer load into torch's Adam.

    Without Transformer Engine or Apex that path of Megatron-core 0.19 has three faults: it reads the step count
    out of a state that a fresh optimizer does not have yet, it looks for ``step`` among the loaded tensors, from
    which it was left out, and it then gives all parameters one and the same ``step`` tensor, which every
    parameter's update would count up.
    """
    adams = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = getattr(part, "optimizer", None)
        if not isinstance(part, DistributedOptimizer) or not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            continue
        adams.append(adam)
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        part._set_main_param_and_optimizer_states = partial(_set_states, part._set_main_param_and_optimizer_states)
    yield
    for adam in adams:
        for state in adam.state.values():
            state["step"] = state["step"].clone()


def _set_states(set_states: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    set_states(model_param, {"step": None, **tensors})


def save_training(
    args: Namespace, step: int, chunks: Sequence[MegatronModule], optimizer: Any, scheduler: Any, state: dict[str, Any]
) -> float:
    """Write the checkpoint of ``step`` completed steps to ``--save``, with the SHA-256 of its files; collective.

    A folder of these steps that is there already, such as a damaged one that was passed over, is removed first. Where
    tokenizer and configuration are missing beside the checkpoints, those of ``--load`` are brought.

    Returns:
        The seconds that the checksums took.

    Raises:
        SaveError: A file cannot be written, on at least this rank. The tracker still names the checkpoint before.
    """
    # Megatron collects write results through a helper process, for savers that fork; starting it costs seconds per
    # rank. Saving is synchronous here (--async-save is refused), so an ordinary queue serves.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    args.camopd_state = json.dumps(state)
    args.iteration, args.consumed_train_samples = step, step * args.global_batch_size
    folder = CheckpointLocation(Path(args.save), step).folder
    try:
        if dist.get_rank() == 0 and folder.exists():
            shutil.rmtree(folder)
        if dist.get_rank() == 0 and not (assets_dir(args.save) / CONFIG).is_file():
            copy_assets(assets_dir(args.load), assets_dir(args.save))
        dist.barrier()
        # Megatron stores all arguments; these are about this start alone, and no plain values.
        plain = arguments(args, resumed=None, passed_over=None)
        with plain, quiet_megatron(args), _checksums_before_tracker() as seconds:
            save_checkpoint(step, list(chunks), optimizer, scheduler, 0)
        dist.barrier()
    # Writers raise OSError, or wrap it in errors of their own; torch's for that is no Exception.
    except (OSError, RuntimeError, ConfigurationError, CheckpointException) as error:
        reason = _disk_error(Path(args.save))
        if isinstance(error, CheckpointException):  # raised on every rank when the files of one cannot be written
            reason = first_problem(reason)
        reason = reason or _cause(error)
        _remove_own_files(folder)
        raise SaveError(f"{folder}: cannot be saved ({reason})") from error
    return sum(seconds)


@contextmanager
def _checksums_before_tracker() -> Iterator[list[float]]:
    """Let Megatron's save hash the files that it writes, and write the checksums before the tracker names them.

    Yields a list of the seconds that this took after the files were written.
    """
    plain, seconds = checkpointing.dist_checkpointing.save, []
    digests: dict[str, str] = {}
    writer: Any = filesystem_async
    logger = logging.getLogger(writer.__name__)  # it prints errors that are raised as well

    def save(state: Any, folder: str, *args: Any, **options: Any) -> Any:
        request = plain(state, folder, *args, **options)
        start = time.monotonic()
        _write_own_checksums(Path(folder), digests)
        seconds.append(time.monotonic() - start)
        return request

    checkpointing.dist_checkpointing.save = save
    writer.open = lambda path, mode: HashingFile(path, digests)
    logger_was_disabled, logger.disabled = logger.disabled, True
    try:
        yield seconds
    finally:
        checkpointing.dist_checkpointing.save = plain
        del writer.open
        logger.disabled = logger_was_disabled


def _write_own_checksums(folder: Path, digests: dict[str, str]) -> None:
    """Write the checksums of all ranks on rank 0; collective.

    ``digests``: those of files that were hashed while this rank wrote them; its other files, small ones, are read.
    """
    files = {path.name: path for path in _own_files(folder) if path.name != SUMS}
    own = {name: digest for name, digest in digests.items() if name in files}
    own |= hash_files(path for name, path in files.items() if name not in own)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    if dist.get_rank() == 0:
        write_checksums(folder, {name: digest for digests in gathered for name, digest in digests.items()})


def _disk_error(folder: Path) -> str | None:
    """Return why files cannot be written to ``folder``, or None if they can; torch's writer does not pass it on."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _remove_own_files(folder: Path) -> None:
    """Remove what this rank wrote of a checkpoint that failed, so that it does not fill the disk."""
    if (folder / SUMS).exists():  # an older complete one of the same step, or the failure came after the checkpoint
        return
    with contextlib.suppress(OSError):
        for path in _own_files(folder):
            path.unlink(missing_ok=True)
        folder.rmdir()


def _own_files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that this rank wrote; rank 0 also wrote those that belong to no rank."""
    writers = {path: re.match(r"__(\d+)_", path.name) for path in folder.iterdir() if path.is_file()}
    return [path for path, writer in writers.items() if int(writer[1] if writer else 0) == dist.get_rank()]


def _cause(error: BaseException) -> str:
    """Return the reason at the root of an error, in one line."""
    while True:
        failures = list(getattr(error, "failures", {}).values())
        inner = failures[0][0] if failures else error.__cause__ or error.__context__
        if isinstance(error, OSError) or not isinstance(inner, BaseException):
            break
        error = inner
    reason = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), type(error).__name__)
    return " ".join(reason.split())


@contextmanager
def _readable(location: CheckpointLocation) -> Iterator[None]:
    """Name the checkpoint whose tensors turn out to be damaged. torch's error for that is no Exception."""
    try:
        yield
    except (CheckpointException, pickle.UnpicklingError) as error:
        raise ConfigurationError(
            f"{location.directory}: its checkpoint cannot be read ({_cause(error)}); it is damaged"
        ) from error
