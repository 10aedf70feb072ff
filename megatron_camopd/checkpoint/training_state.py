"""The state that a training run saves and restores: Megatron's checkpoint with the CaMOPD state inside.

Model, optimizer, learning-rate schedule and RNG are Megatron's (torch_dist, resharded at load). The CaMOPD state -
the settings that decide what the next step computes, the teachers' paths, the place in every prompt stream - is
a small JSON text carried as ``args.camopd_state`` in the same checkpoint, so the two can never disagree. The
tracker file is written after all of it.
"""

import json
import pickle
import queue
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from torch.distributed.checkpoint import CheckpointException

from megatron_camopd.checkpoint.assets import CONFIG, assets_dir, copy_assets
from megatron_camopd.checkpoint.unpickling import restricted_unpickling
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime.startup import quiet_megatron


def read_state(args: Namespace) -> dict[str, Any]:
    """Return the CaMOPD state of the checkpoint that is being resumed."""
    result: dict[str, Any] = json.loads(args.camopd_state)
    return result


def load_weights(
    args: Namespace,
    chunks: Sequence[MegatronModule],
    directory: str,
    optimizer: Any = None,
    *,
    iteration: int | None = None,
) -> None:
    """Load model weights alone from the checkpoint ``directory`` into ``chunks``; collective.

    ``iteration`` picks one of several checkpoints there (default: the newest). ``optimizer`` takes over the new
    weights as its main parameters (mixed precision).
    """
    weights_only = _arguments(
        args, finetune=True, no_load_optim=True, no_load_rng=True, load=directory, ckpt_step=iteration
    )
    with weights_only, _readable(directory), restricted_unpickling(), quiet_megatron(args):
        load_checkpoint(list(chunks), optimizer, None, strict=True)


def load_training(args: Namespace, chunks: Sequence[MegatronModule], optimizer: Any, scheduler: Any) -> int:
    """Restore everything Megatron keeps from ``--save``; returns the number of steps done. Collective."""
    resuming = _arguments(args, finetune=False, load=args.save)
    with resuming, _readable(args.save), restricted_unpickling(), _torch_adam_loads(optimizer), quiet_megatron(args):
        iteration, _ = load_checkpoint(list(chunks), optimizer, scheduler, strict=True)
    return int(iteration)


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
) -> None:
    """Write the checkpoint of ``step`` completed steps to ``--save``; collective.

    The first one brings tokenizer and configuration from ``--load``; they stay what they were from then on.
    """
    if dist.get_rank() == 0 and not (assets_dir(args.save) / CONFIG).is_file():
        copy_assets(assets_dir(args.load), assets_dir(args.save))
    # Megatron collects write results through a helper process, for savers that fork; starting it costs seconds per
    # rank. Saving is synchronous here (--async-save is refused), so an ordinary queue serves.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    args.camopd_state = json.dumps(state)
    args.iteration, args.consumed_train_samples = step, step * args.global_batch_size
    with quiet_megatron(args):
        save_checkpoint(step, list(chunks), optimizer, scheduler, 0)
    dist.barrier()


@contextmanager
def _readable(directory: str) -> Iterator[None]:
    """Name the checkpoint whose tensors turn out to be damaged. torch's error for that is no Exception."""
    try:
        yield
    except (CheckpointException, pickle.UnpicklingError) as error:
        failures = getattr(error, "failures", {0: (error, None)})
        cause = next(iter(failures.values()))[0]
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ConfigurationError(f"{directory}: its checkpoint cannot be read ({reason}); it is damaged") from error


@contextmanager
def _arguments(args: Namespace, **values: Any) -> Iterator[None]:
    """Megatron's loader reads its options from the global arguments."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)
