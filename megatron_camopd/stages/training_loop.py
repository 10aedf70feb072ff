"""The training loop that all training stages share.

A stage defines one step (``train_step``) and the console line of a record. This module starts Megatron, loads weights,
steps the optimizer and skips bad steps, saves, resumes and ends the run.
"""

import abc
import contextlib
import math
import signal
import time
from argparse import Namespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_model_config
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.training import (
    force_param_sync,
    get_megatron_optimizer_config,
    get_optimizer_param_scheduler,
)

from megatron_camopd.checkpoint.directory import repair_tracker, require_checkpoint
from megatron_camopd.checkpoint.origin import bring_assets, forget_begun, note_begun
from megatron_camopd.checkpoint.training_state import load_training, load_weights, not_finite, save_training
from megatron_camopd.errors import (
    ConfigurationError,
    EngineLostError,
    InterruptedRunError,
    RolloutError,
    SaveError,
    StaleEngineError,
    TrainingDivergedError,
)
from megatron_camopd.model.builder import build_model
from megatron_camopd.model.passes import PassSettings
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.collectives import first_problem, require_agreement
from megatron_camopd.runtime.lock import lost_lock
from megatron_camopd.runtime.signals import stop_requests
from megatron_camopd.runtime.startup import initialize_megatron, quiet_megatron
from megatron_camopd.runtime.writing import written_by_all
from megatron_camopd.stages.metrics import MetricsLog
from megatron_camopd.stages.settings import SafetySettings
from megatron_camopd.stages.skipped_steps import SkippedSteps


class Plan(Protocol):
    """The checked inputs of a training stage; ``state`` is that in the resumed checkpoint, or None in a new run."""

    state: dict[str, Any] | None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the plan, as JSON values."""
        ...

    def fingerprint(self) -> str:
        """Return a text that is equal on ranks with equal plans."""
        ...


class TrainingLoop(abc.ABC):
    """One training run on this rank; its construction is collective.

    Args:
        args: The arguments from ``parse_arguments``.
        plan: The plan of the stage.
    """

    plan: Plan

    def __init__(self, args: Namespace, plan: Plan) -> None:
        self.args, self.plan, self.started = args, plan, time.monotonic()
        initialize_megatron(args)
        if dist.get_rank() == 0 and args.micro_batch_note is not None:
            print(args.micro_batch_note, flush=True)
        require_agreement("checkpoints, data or settings", plan.fingerprint())
        with quiet_megatron(args):
            self.model = build_model(args, trainable=True)
            self.optimizer, self.scheduler = _build_optimizer(args, self.model)
        self.passes = PassSettings.of(args)
        self.step, self.diverged = 0, False  # whether loss or gradients of the last step were not finite
        self.skipped = SkippedSteps(SafetySettings.of(args).max_skipped_steps)

    def restore(self) -> None:
        """Load the weights in ``--load`` or, in a resumed run, the whole checkpoint in ``--save``; collective.

        A stage calls it after it has built all other models, because building one changes the random state that is
        restored here.
        """
        if self.plan.state is None:
            load_weights(self.args, self.model, require_checkpoint("--load", self.args.load), self.optimizer)
        else:
            self.step = load_training(self.args, self.model, self.optimizer, self.scheduler)
            with written_by_all(f"--save {self.args.save}"):
                if dist.get_rank() == 0:  # the one that it named may be damaged, and Megatron reads it when it saves
                    repair_tracker(self.args.resumed)
            self.skipped.load_state_dict(self.plan.state)
            self.passes.shapes.update(self.plan.state.get("microbatch_shapes", []))

    @abc.abstractmethod
    def train_step(self) -> dict[str, Any]:
        """Do one step and return its record, a flat dictionary with ``step``."""

    @staticmethod
    @abc.abstractmethod
    def console_line(record: dict[str, Any]) -> str:
        """Return the record as one line for the console."""

    def step_warning(self, record: dict[str, Any]) -> str | None:
        """Return a warning about a finished step, or None."""
        return None

    def data_source(self, record: dict[str, Any]) -> str:
        """Return the name of what a finished step's data came from; skipped steps are counted for each, on every rank.

        A resumed run knows the counts by these names, so no path is part of one.
        """
        return ""

    def describe_source(self, record: dict[str, Any]) -> str:
        """Return the words that name the data source of a step after "steps in a row"; empty if there is only one."""
        return ""

    def clear_gradients(self) -> None:
        """Set all gradients to zero, before those of a step are accumulated."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def apply_gradients(self, loss: float) -> dict[str, Any]:
        """Step the optimizer with the accumulated gradients; if they or ``loss`` are not finite, change nothing."""
        loss_scale = float(self.optimizer.get_loss_scale())
        overflow = self.optimizer.prepare_grads()
        if self.args.clip_grad > 0:
            grad_norm = _clip_gradients(self.optimizer, self.args.clip_grad)
        else:
            grad_norm = float(self.optimizer.get_grad_norm())
        learning_rate = self.optimizer.param_groups[0]["lr"]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        skipped = overflow or not finite
        if not skipped:
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(increment=self.args.global_batch_size)
            if self.args.overlap_param_gather:  # rollouts, weight sync and checkpoints need the gathered weights next
                force_param_sync(self.model, self.optimizer)
        # Dynamic fp16 scaling finds its loss scale by overflows that lower it; those are no sign of divergence.
        searching = overflow and math.isfinite(loss) and float(self.optimizer.get_loss_scale()) < loss_scale
        self.diverged = skipped and not searching
        return {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "skipped": int(skipped)}

    def run(self) -> None:
        """Train until ``--train-iters``, a stop signal or Megatron's exit flags end the run, and save checkpoints.

        Raises:
            TrainingDivergedError: Too many steps had no finite loss or gradients (``--max-skipped-steps``), or a weight
                is not finite.
            InterruptedRunError: A signal ended the run, which was saved.
            SaveError: A checkpoint or a record cannot be written.
        """
        args, saved_at = self.args, self.step
        if dist.get_rank() == 0 and self.step:
            print(f"resuming after {self.step} of {args.train_iters} steps from {args.save}", flush=True)
        with (
            contextlib.closing(self._open_log()) as log,  # flush the records also if the run ends with an error
            stop_requests(signal.SIGTERM, args.exit_signal) as request,
        ):
            while self.step < args.train_iters:
                request.begin("step")
                before = self.state_dict()
                try:
                    record = self.train_step()
                except (RolloutError, StaleEngineError, ConfigurationError) as error:  # the model is as before the step
                    if self.step > saved_at and not isinstance(error, EngineLostError):
                        request.begin("save")
                        self.save(before, saved_at)
                    raise
                self.step += 1
                self._write(log, record)
                if dist.get_rank() == 0 and (warning := self.step_warning(record)):
                    print(warning, flush=True)
                self._count_skips(record, saved_at)
                stopped_by = first_problem(request.name)
                leaving = self.step >= args.train_iters or stopped_by is not None or self.asked_to_leave()
                if leaving or (args.save_interval and self.step % args.save_interval == 0):
                    request.begin("save")
                    self.save(self.state_dict(), saved_at)
                    saved_at = self.step
                if stopped_by is not None and self.step < args.train_iters:
                    raise InterruptedRunError(
                        f"{stopped_by}: saved {self.step} of {args.train_iters} steps to {args.save}; run the same "
                        "command again to go on"
                    )
                if leaving:
                    break

    def _write(self, log: MetricsLog, record: dict[str, Any]) -> None:
        """Write the record of a step; if rank 0 cannot, all ranks end."""
        with written_by_all(f"--save {self.args.save}"):
            log.write(record)

    def _count_skips(self, record: dict[str, Any], saved_at: int) -> None:
        """Count the step if it was skipped.

        Raises:
            TrainingDivergedError: There were too many.
        """
        exceeded = self.skipped.count(self.diverged, self.data_source(record))
        if exceeded is not None:
            number, kind = exceeded
            raise TrainingDivergedError(
                f"loss or gradients were not finite in {number} {kind.format(source=self.describe_source(record))} "
                f"(--max-skipped-steps); {self._last_checkpoint(saved_at)}"
            )

    def _last_checkpoint(self, saved_at: int) -> str:
        if not saved_at:
            return f"{self.args.save} holds no checkpoint yet"
        return f"the last checkpoint in {self.args.save} is of step {saved_at}"

    def asked_to_leave(self) -> bool:
        """Return whether Megatron's exit flags end the run after this step: an interval or a duration."""
        args = self.args
        asked = bool(args.exit_interval and self.step % args.exit_interval == 0)
        if args.exit_duration_in_mins:
            minutes = torch.tensor((time.monotonic() - self.started) / 60, device=accelerator.current().device)
            dist.broadcast(minutes, 0)  # clocks differ between ranks, but all ranks must decide alike
            asked |= float(minutes) > args.exit_duration_in_mins
        return asked

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores beside model, optimizer and random states, as JSON values."""
        shapes = sorted(self.passes.shapes)  # so that a resumed run counts on
        return {**self.plan.state_dict(), **self.skipped.state_dict(), "microbatch_shapes": shapes}

    def save(self, state: dict[str, Any], saved_at: int = 0) -> None:
        """Save a checkpoint of the steps done so far, unless its weights are not finite; collective.

        Args:
            state: The :meth:`state_dict` after these steps.
            saved_at: Number of steps in the checkpoint before, for the error text; 0 if there is none.

        Raises:
            TrainingDivergedError: A weight is not finite.
            SaveError: The checkpoint cannot be written, or another run has taken over the folder.
        """
        start = time.monotonic()
        if (problem := first_problem(lost_lock())) is not None:
            raise SaveError(problem)
        if (name := not_finite(self.model)) is not None:
            raise TrainingDivergedError(
                f"weight {name} is not finite after {self.step} steps, which are not saved; "
                f"{self._last_checkpoint(saved_at)}"
            )
        checksums = save_training(self.args, self.step, self.model, self.optimizer, self.scheduler, state)
        with written_by_all(f"--save {self.args.save}"):
            if dist.get_rank() == 0:
                forget_begun(self.args.save)
        if dist.get_rank() == 0:
            print(
                f"saved {self.step} steps to {self.args.save} in {time.monotonic() - start:.1f}s "
                f"(checksums {checksums:.2f}s)",
                flush=True,
            )

    def _open_log(self) -> MetricsLog:
        with written_by_all(f"--save {self.args.save}"):
            if dist.get_rank() == 0 and self.plan.state is None:
                bring_assets(self.args)
                note_begun(self.args.save, self.state_dict())
            return MetricsLog(
                self.args.save,
                first_step=self.step,
                writes_file=dist.get_rank() == 0,
                tensorboard=get_tensorboard_writer(),
                wandb=get_wandb_writer(),
                console_line=self.console_line,
            )


def _clip_gradients(optimizer: Any, limit: float) -> float:
    """Scale the gradients down to the norm ``limit``; returns the norm before.

    With expert parallelism Megatron chains an optimizer of the experts to that of the other parameters. They sum norms
    over different ranks, and only ``step`` clips them together.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(parts) == 1 or optimizer.grads_states_parallel_group_is_shared():
        return float(optimizer.clip_grad_norm(limit))
    norm = float(optimizer.get_grad_norm())
    for part in parts:
        if parameters := part.get_parameters():
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, limit, norm, decoupled)
    return norm


def _build_optimizer(args: Namespace, model: list[Any]) -> tuple[Any, Any]:
    """Build Megatron's optimizer and learning-rate schedule, and set the hooks of its pipeline schedule."""
    config, overrides = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(config, model, config_overrides=overrides)
    model_config = get_model_config(model[0])
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        model_config.no_sync_func = model[0].no_sync
        if args.align_grad_reduce:
            model_config.grad_sync_func = model[0].start_grad_sync
    if args.overlap_param_gather and args.align_param_gather:
        model_config.param_sync_func = model[0].start_param_sync
    return optimizer, get_optimizer_param_scheduler(optimizer)
