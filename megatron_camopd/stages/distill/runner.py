"""The training step of CaMOPD, and the run around it.

``Trainer.train_step`` reads as the algorithm: branches, prompts, synchronisation, rollouts, scores, the method's
weights, training. The rollout engine gets the weights when it needs them, at the beginning of a step: until it has
answered, nothing of the step has happened, and a run whose engine fails can save what it had before. Every decision
that depends on data (scores, selection, skipping a bad step) is made from the gathered global batch, so all ranks take
it alike without asking each other.
"""

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, TokenQuestion, TokenScores
from megatron_camopd.data import EncodedPrompt
from megatron_camopd.diagnostics.gradients import DiagnosticsSettings, GradientDiagnostics
from megatron_camopd.model.passes import PassSettings, accumulate_gradients, score_tokens
from megatron_camopd.objective.method import Composition, TrainingWeights, rows_of_branches, weigh_or_spoil
from megatron_camopd.rollout.freshness import TOLERANCES, mismatch_warning
from megatron_camopd.rollout.registry import ENGINES
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.collectives import gather_scores
from megatron_camopd.runtime.layout import Layout
from megatron_camopd.runtime.startup import quiet_megatron
from megatron_camopd.schedule import Branch
from megatron_camopd.stages.distill.plan import DistillPlan
from megatron_camopd.stages.distill.settings import DistillSettings
from megatron_camopd.stages.metrics import Timer, batch_metrics, console_line
from megatron_camopd.stages.training_loop import TrainingLoop
from megatron_camopd.teachers.bank import TeacherBank


class DistillRunner(TrainingLoop):
    """One run on this rank: ``args`` of ``parse_arguments``, ``plan`` of ``plan_run``. Construction is collective."""

    plan: DistillPlan

    def __init__(self, args: Namespace, plan: DistillPlan) -> None:
        super().__init__(args, plan)
        self.method, self.passes = plan.method, PassSettings.of(args)
        with quiet_megatron(args):
            self.teachers = TeacherBank(args, {branch: teacher.location for branch, teacher in plan.teachers.items()})
        self.restore()
        engine = ENGINES[RolloutSettings.of(args).rollout_engine]
        self.engine = engine.build(args, self.model, plan.end_of_sequence_ids)
        given = DistillSettings.of(args).rollout_mismatch_warning
        self.usual_mismatch = TOLERANCES[args.params_dtype].mean if given is None else given
        self.diagnostics = GradientDiagnostics(
            DiagnosticsSettings.of(args),
            self.passes,
            self.model,
            plan.probe_streams,
            self.collect,
            first_probe_index=args.global_batch_size,
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
            **batch_metrics(batch, self.passes.importance, composition),
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
        data = Layout.current().data
        share = torch.arange(data.rank, len(prompts), data.size)
        return self.engine.generate([prompts[place].token_ids for place in share], first_index + share, step=self.step)

    def score(self, rollout: RolloutBatch, composition: Composition, first_index: int = 0) -> ScoredBatch:
        """What student and teachers say of this rank's share, gathered to the global batch on every rank."""
        student = score_tokens(self.passes, self.model, rollout, self.method.student_question(rollout, self.step))
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
        return gather_scores(local, Layout.current().data.group)

    def score_by_teachers(
        self, rollout: RolloutBatch, question: TokenQuestion, rows: dict[Branch, Tensor]
    ) -> TokenScores:
        """Each sample's answer from its own branch's teacher; ``rows`` of ``rollout`` per branch."""
        answers = []
        for branch in self.teachers.in_order(branch for branch in rows if len(rows[branch])):
            teacher, own = self.teachers.activate(branch), rows[branch]
            answers.append((own, score_tokens(self.passes, teacher, rollout.take(own), question.take(own))))
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
        self.clear_gradients()
        loss, trained_tokens = accumulate_gradients(
            self.passes, self.model, batch, weights.coefficients, weights.advantage_floor
        )
        return {**self.apply_gradients(loss), "trained_tokens": trained_tokens}

    def step_warning(self, record: dict[str, Any]) -> str | None:
        return mismatch_warning(record, self.usual_mismatch)

    console_line = staticmethod(console_line)
