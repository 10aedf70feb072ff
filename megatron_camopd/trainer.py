"""The training step of CaMOPD, and the run around it.

``Trainer.train_step`` reads as the algorithm: branches, prompts, synchronisation, rollouts, scores, the method's
weights, training. The rollout engine gets the weights when it needs them, at the beginning of a step: until it has
answered, nothing of the step has happened, and a run whose engine fails can save what it had before. Every decision
that depends on data (scores, selection, skipping a bad step) is made from the gathered global batch, so all ranks take
it alike without asking each other.
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
from megatron_camopd.batch import RolloutBatch, ScoredBatch, TokenQuestion, TokenScores
from megatron_camopd.checkpoint.training_state import load_training, load_weights, save_training
from megatron_camopd.collectives import gather_scores, require_agreement
from megatron_camopd.data import EncodedPrompt
from megatron_camopd.diagnostics.gradients import GradientDiagnostics
from megatron_camopd.errors import EngineLostError, RolloutError, StaleEngineError, TrainingDivergedError
from megatron_camopd.metrics import MetricsLog, Timer, batch_metrics
from megatron_camopd.model.builder import build_model
from megatron_camopd.model.initialization import initialize_megatron
from megatron_camopd.model.passes import accumulate_gradients, score_tokens
from megatron_camopd.objective.method import Composition, TrainingWeights, rows_of_branches, weigh_or_spoil
from megatron_camopd.rollout.builder import build_engine
from megatron_camopd.rollout.freshness import TOLERANCES, mismatch_warning
from megatron_camopd.run_plan import RunPlan
from megatron_camopd.schedule import Branch
from megatron_camopd.teachers.bank import TeacherBank


class Trainer:
    """One run on this rank: ``args`` of ``parse_arguments``, ``plan`` of ``plan_run``. Construction is collective."""

    def __init__(self, args: Namespace, plan: RunPlan) -> None:
        self.args, self.plan, self.method, self.started = args, plan, plan.method, time.monotonic()
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
        self.diagnostics = GradientDiagnostics(args, self.model, plan.probe_streams, self.collect)
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
        composition = self.plan.schedule.composition(self.step, self.args.global_batch_size)
        streams = [self.plan.streams[branch] for branch in composition]
        prompts = [prompt for stream, n in zip(streams, composition.values(), strict=True) for prompt in stream.next(n)]
        with timer("sync"):
            self.engine.synchronize(step=self.step)
        with timer("rollout"):
            rollout = self.generate(prompts)
        with timer("score"):
            batch = self.score(rollout, composition)
        weights = weigh_or_spoil(self.method, batch, composition, self.step)
        with timer("diagnostics"):
            findings = self.diagnostics.measure(self.step, batch, composition, weights)
        self.prefetch_teacher(self.step + 1)
        with timer("train"):
            update = self.update(batch, weights)
        return {
            "step": self.step,
            "branch": next(iter(composition)).value if len(composition) == 1 else "mixed",
            **update,
            "selected_fraction": float(weights.selected.double().mean()),
            **weights.metrics,
            **batch_metrics(batch, self.importance, composition),
            **findings,
            "prompts_truncated": sum(stream.truncated for stream in streams),
            "prompts_skipped": sum(stream.skipped for stream in streams),
            **timer.seconds,
            "peak_memory_gib": accelerator.peak_memory_bytes() / 2**30,
        }

    def generate(self, prompts: list[EncodedPrompt], first_index: int = 0) -> RolloutBatch:
        """Responses of this data-parallel rank's share of ``prompts``: rank, rank + ranks, ...

        Prompt i has the index ``first_index`` + i in the batch, which with the step decides its random numbers.
        """
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        share = torch.arange(rank, len(prompts), ranks)
        return self.engine.generate([prompts[place].token_ids for place in share], first_index + share, step=self.step)

    def score(self, rollout: RolloutBatch, composition: Composition, first_index: int = 0) -> ScoredBatch:
        """What student and teachers say of this rank's share, gathered to the global batch on every rank."""
        student = score_tokens(self.args, self.model, rollout, self.method.student_question(rollout, self.step))
        question = self.method.teacher_question(student)
        rows = rows_of_branches(rollout.indices - first_index, composition)
        teacher = self.score_by_teachers(rollout, question, rows)
        local = ScoredBatch(
            rollout,
            teacher_logprobs=teacher.logprobs,
            student_logprobs=student.logprobs,
            student_entropies=student.entropies,
            accepted=self.method.accepted(rollout, self.step, student, teacher),
        )
        return gather_scores(local, parallel_state.get_data_parallel_group())

    def score_by_teachers(
        self, rollout: RolloutBatch, question: TokenQuestion, rows: dict[Branch, Tensor]
    ) -> TokenScores:
        """Each sample's answer from its own branch's teacher; ``rows`` of ``rollout`` per branch."""
        answers = []
        for branch in self.teachers.in_order(branch for branch in rows if len(rows[branch])):
            teacher, own = self.teachers.activate(branch), rows[branch]
            answers.append((own, score_tokens(self.args, teacher, rollout.take(own), question.take(own))))
        return TokenScores.merge(answers)

    def collect(self, prompts: list[EncodedPrompt], composition: Composition, first_index: int) -> ScoredBatch:
        """A scored batch beside the step's own, for diagnostics."""
        return self.score(self.generate(prompts, first_index), composition, first_index)

    def prefetch_teacher(self, step: int) -> None:
        """Start bringing in the teacher that ``step`` needs first."""
        composition = self.plan.schedule.composition(step, self.args.global_batch_size)
        self.teachers.prefetch(self.teachers.in_order(composition)[0])

    def update(self, batch: ScoredBatch, weights: TrainingWeights) -> dict[str, Any]:
        """Forward, backward and optimizer step; a step with non-finite loss or gradients changes nothing."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, trained_tokens = accumulate_gradients(
            self.args, self.model, batch, weights.coefficients, weights.advantage_floor
        )
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
