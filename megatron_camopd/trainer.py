"""The training step of CaMOPD, and the run around it.

``Trainer.train_step`` reads as the algorithm: branch, prompts, synchronisation, rollouts, teacher, gap, selection,
training. The rollout engine gets the weights when it needs them, at the beginning of a step: until it has answered,
nothing of the step has happened, and a run whose engine fails can save what it had before. Every decision that depends
on data (scores, selection, skipping a bad step) is made from the gathered global batch, so all ranks take it alike
without asking each other.
"""

import contextlib
import math
import time
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.utils import get_model_config
from megatron.training.global_vars import get_signal_handler, get_tensorboard_writer, get_wandb_writer
from megatron.training.training import (
    force_param_sync,
    get_megatron_optimizer_config,
    get_optimizer_param_scheduler,
)
from torch import Tensor

from megatron_camopd import accelerator
from megatron_camopd.arguments import quiet_megatron
from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.checkpoint.training_state import load_training, load_weights, save_training
from megatron_camopd.collectives import gather_scores, require_agreement
from megatron_camopd.data import EncodedPrompt
from megatron_camopd.errors import EngineLostError, RolloutError, StaleEngineError, TrainingDivergedError
from megatron_camopd.metrics import MetricsLog, Timer, batch_metrics
from megatron_camopd.model.builder import build_model
from megatron_camopd.model.initialization import initialize_megatron
from megatron_camopd.model.passes import accumulate_gradients, score_responses
from megatron_camopd.objective import gap_scores, log_prob_gap, sample_coefficients, select_by_gap_mass
from megatron_camopd.rollout.builder import build_engine
from megatron_camopd.rollout.freshness import TOLERANCES, mismatch_warning
from megatron_camopd.run_plan import RunPlan
from megatron_camopd.schedule import Branch
from megatron_camopd.teachers.bank import TeacherBank


class Trainer:
    """One run on this rank: ``args`` of ``parse_arguments``, ``plan`` of ``plan_run``. Construction is collective."""

    def __init__(self, args: Namespace, plan: RunPlan) -> None:
        self.args, self.plan, self.started = args, plan, time.monotonic()
        initialize_megatron(args)
        require_agreement("checkpoints, prompts or settings", plan.fingerprint())
        with quiet_megatron(args):
            self.model = build_model(args, trainable=True)
            self.optimizer, self.scheduler = _build_optimizer(args, self.model)
            self.teachers = TeacherBank(args, {branch: teacher.location for branch, teacher in plan.teachers.items()})
        self.step, self.skipped_in_a_row = 0, 0
        if plan.state is None:
            load_weights(args, self.model, args.load, self.optimizer)
        else:
            self.step = load_training(args, self.model, self.optimizer, self.scheduler)
            self.skipped_in_a_row = plan.state["skipped_in_a_row"]
        self.engine = build_engine(args, self.model, plan.end_of_sequence_ids)
        given = args.rollout_mismatch_warning
        self.usual_mismatch = TOLERANCES[args.params_dtype].mean if given is None else given
        self.importance = (args.importance_correction, args.importance_low, args.importance_high)
        self.log = MetricsLog(
            args.save,
            first_step=self.step,
            writes_file=dist.get_rank() == 0,
            tensorboard=get_tensorboard_writer(),
            wandb=get_wandb_writer(),
        )

    def train_step(self) -> dict[str, Any]:
        """One step of the algorithm; returns its record."""
        timer = Timer()
        branch = self.plan.schedule.branch(self.step)
        stream = self.plan.streams[branch]
        prompts = stream.next(self.args.global_batch_size)
        with timer("sync"):
            self.engine.synchronize(step=self.step)
        with timer("rollout"):
            rollout = self.generate(prompts)
        with timer("score"):
            teacher = self.teachers.activate(branch)
            batch = self.score(teacher, rollout)
        self.teachers.prefetch(self.plan.schedule.branch(self.step + 1))
        selected, coefficients = self.select(batch, branch)
        with timer("train"):
            update = self.update(batch, coefficients)
        return {
            "step": self.step,
            "branch": branch.value,
            **update,
            "selected_fraction": float(selected.double().mean()),
            **batch_metrics(batch, self.importance),
            "prompts_truncated": stream.truncated,
            "prompts_skipped": stream.skipped,
            **timer.seconds,
            "peak_memory_gib": accelerator.peak_memory_bytes() / 2**30,
        }

    def generate(self, prompts: list[EncodedPrompt]) -> RolloutBatch:
        """Responses of this data-parallel rank's share of the global batch: prompts rank, rank + ranks, ..."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        indices = torch.arange(rank, len(prompts), ranks)
        return self.engine.generate([prompts[index].token_ids for index in indices], indices, step=self.step)

    def score(self, teacher: list[Any], rollout: RolloutBatch) -> ScoredBatch:
        """Both models' log-probabilities of this rank's share, gathered to the global batch on every rank."""
        local = ScoredBatch(
            rollout=rollout,
            teacher_logprobs=score_responses(self.args, teacher, rollout),
            student_logprobs=score_responses(self.args, self.model, rollout),
        )
        return gather_scores(local, parallel_state.get_data_parallel_group())

    def select(self, batch: ScoredBatch, branch: Branch) -> tuple[Tensor, Tensor]:
        """Which samples of the global batch are trained ([N] bool), and with what coefficients ([N] float32)."""
        general = branch is Branch.GENERAL
        mass_target = self.args.general_mass_target if general else self.args.domain_mass_target
        scale = self.args.general_feedback_scale if general else self.args.domain_feedback_scale
        gap = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
        scores = gap_scores(gap, batch.response_mask, branch)
        if not torch.isfinite(scores).all():
            # Nothing can be ranked. Coefficients that are NaN make the loss NaN: update() skips and counts the step.
            return torch.ones_like(scores, dtype=torch.bool), torch.full_like(scores, math.nan, dtype=torch.float32)
        selected = select_by_gap_mass(scores, mass_target)
        return selected, sample_coefficients(scores, selected, batch.rollout.response_lengths, scale)

    def update(self, batch: ScoredBatch, coefficients: Tensor) -> dict[str, Any]:
        """Forward, backward and optimizer step; a step with non-finite loss or gradients changes nothing."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, trained_tokens = accumulate_gradients(self.args, self.model, batch, coefficients)
        loss_scale = float(self.optimizer.get_loss_scale())
        overflow = self.optimizer.prepare_grads()
        if self.args.clip_grad > 0:
            grad_norm = float(self.optimizer.clip_grad_norm(self.args.clip_grad))
        else:
            grad_norm = float(self.optimizer.get_grad_norm())
        learning_rate = self.optimizer.param_groups[0]["lr"]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        skipped = overflow or not finite
        if not skipped:
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(increment=self.args.global_batch_size)
            if self.args.overlap_param_gather:  # rollouts, weight sync and checkpoints read the weights next
                force_param_sync(self.model, self.optimizer)
        # An overflow that lowers the loss scale is how dynamic fp16 scaling finds it, no sign of divergence.
        searching = overflow and math.isfinite(loss) and float(self.optimizer.get_loss_scale()) < loss_scale
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped and not searching else 0
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped": int(skipped),
            "trained_tokens": trained_tokens,
        }

    def train(self) -> None:
        """Steps until ``--train-iters`` (or ``--exit-interval``), saving as the flags say."""
        args, saved_at = self.args, self.step
        if dist.get_rank() == 0 and self.step:
            print(f"resuming after {self.step} of {args.train_iters} steps from {args.save}", flush=True)
        with contextlib.closing(self.log):  # what was written stays written, however the run ends
            while self.step < args.train_iters:
                before = self.state_dict()
                try:
                    record = self.train_step()
                except (RolloutError, StaleEngineError) as error:
                    if self.step > saved_at and not isinstance(error, EngineLostError):
                        self.save(before)
                    raise
                self.step += 1
                self.log.write(record)
                if dist.get_rank() == 0 and (warning := mismatch_warning(record, self.usual_mismatch)):
                    print(warning, flush=True)
                if self.skipped_in_a_row >= args.max_skipped_steps:
                    raise TrainingDivergedError(
                        f"loss or gradients were not finite in {self.skipped_in_a_row} steps in a row "
                        f"(--max-skipped-steps); the last checkpoint in {args.save} is of step {saved_at}"
                    )
                leaving = self.step >= args.train_iters or self.asked_to_leave()
                if leaving or (args.save_interval and self.step % args.save_interval == 0):
                    self.save(self.state_dict())
                    saved_at = self.step
                if leaving:
                    break

    def asked_to_leave(self) -> bool:
        """Whether Megatron's exit flags end the run here: an interval, a duration, a signal that was caught."""
        args = self.args
        asked = bool(args.exit_interval and self.step % args.exit_interval == 0)
        if args.exit_signal_handler:
            asked |= any(get_signal_handler().signals_received())
        if args.exit_duration_in_mins:
            minutes = torch.tensor((time.monotonic() - self.started) / 60, device=accelerator.current().device)
            dist.broadcast(minutes, 0)  # clocks differ; ranks must not
            asked |= float(minutes) > args.exit_duration_in_mins
        return asked

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model, optimizer and random states, as JSON values."""
        return {**self.plan.state_dict(), "skipped_in_a_row": self.skipped_in_a_row}

    def save(self, state: dict[str, Any]) -> None:
        """A checkpoint of the steps done so far; ``state``: the :meth:`state_dict` after them."""
        start = time.monotonic()
        save_training(self.args, self.step, self.model, self.optimizer, self.scheduler, state)
        if dist.get_rank() == 0:
            print(f"saved {self.step} steps to {self.args.save} in {time.monotonic() - start:.1f}s", flush=True)


def _build_optimizer(args: Namespace, model: list[Any]) -> tuple[Any, Any]:
    """Megatron's optimizer and learning-rate schedule, and the hooks its pipeline schedule wants in the config."""
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
