"""The training step of distillation.

``DistillRunner.train_step`` reads as the algorithm: branches, prompts, synchronisation, rollouts, scores, the method's
weights, training. The rollout engine gets the student's weights at the beginning of a step. If it fails, the model is
still as before the step, so the run can save its state. Every decision that depends on data (scores, selection,
skipping a bad step) is made from the gathered global batch, so all ranks decide alike without further communication.
"""

import math
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest, TokenScores
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.data import PromptBatch
from megatron_camopd.data.end_of_sequence import named_ids
from megatron_camopd.diagnostics.gradients import DiagnosticsSettings, GradientDiagnostics
from megatron_camopd.model.packing import imbalance
from megatron_camopd.model.passes import PassSettings, accumulate_gradients, score_tokens
from megatron_camopd.objective.method import TrainingWeights, compute_weights
from megatron_camopd.rollout.freshness import TOLERANCES, mismatch_warning
from megatron_camopd.rollout.registry import ENGINES
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.collectives import gather_rollouts, join_rows
from megatron_camopd.runtime.layout import Layout
from megatron_camopd.runtime.startup import quiet_megatron
from megatron_camopd.stages.distill.plan import DistillPlan, notes
from megatron_camopd.stages.distill.samples import SampleLog, SampleSettings
from megatron_camopd.stages.distill.settings import DistillSettings
from megatron_camopd.stages.metrics import Timer, batch_metrics, console_line
from megatron_camopd.stages.training_loop import TrainingLoop
from megatron_camopd.teachers.bank import TeacherBank


class DistillRunner(TrainingLoop):
    """One distillation run on this rank; its construction is collective.

    Args:
        args: The arguments from ``parse_arguments``.
        plan: The plan from ``plan_distillation``.
    """

    plan: DistillPlan

    def __init__(self, args: Namespace, plan: DistillPlan) -> None:
        super().__init__(args, plan)
        self.method = plan.method
        with quiet_megatron(args):
            self.teachers = TeacherBank(args, [teacher.location for teacher in plan.teachers])
        self.restore()
        for line in notes(plan):
            print(line, flush=True)
        engine = ENGINES[RolloutSettings.of(args).rollout_engine]
        self.engine = engine.build(args, self.model, plan.end_of_sequence_ids)
        given = DistillSettings.of(args).rollout_mismatch_warning
        self.usual_mismatch = TOLERANCES[args.params_dtype].mean if given is None else given
        self.diagnostics = GradientDiagnostics(
            DiagnosticsSettings.of(args),
            PassSettings.of(args),  # of its own, with another count of shapes
            self.model,
            plan.table.branches,
            plan.probe_streams,
            self.collect,
            first_probe_index=args.global_batch_size,
        )
        self.samples = SampleLog(
            SampleSettings.of(args),
            plan.tokenizer,
            plan.table.branches,
            self.served,
            directory=args.save if dist.get_rank() == 0 else None,
            first_step=self.step,
        )

    def train_step(self) -> dict[str, Any]:
        """Do one step of the algorithm and return its record."""
        timer = Timer()
        counts = self.plan.table.schedule.counts(self.step, self.args.global_batch_size)
        prompts = PromptBatch.draw(self.plan.streams, counts)
        with timer("sync"):
            self.engine.synchronize(step=self.step)
        with timer("rollout"):
            rollout = self.generate(prompts)
        with timer("score"):
            batch = self.score(rollout, prompts)
        weights = compute_weights(self.method, batch, self.step)
        with timer("diagnostics"):
            findings = self.diagnostics.measure(self.step, batch, weights)
        self.prefetch_teacher(self.step + 1)
        with timer("train"):
            update = self.update(batch, weights)
        self.samples.write(self.step, batch, weights.selected)
        served = self.served(self.step)
        return {
            "step": self.step,
            "branch": self.plan.names[served[0]] if len(served) == 1 else "mixed",
            **update,
            "selected_fraction": float(weights.selected.double().mean()),
            **weights.metrics,
            **batch_metrics(batch, self.passes.importance, self.plan.names),
            **findings,
            "prompts_truncated": sum(self.plan.streams[branch].truncated for branch in served),
            "prompts_skipped": sum(self.plan.streams[branch].skipped for branch in served),
            "score_balance": imbalance(
                [share.tolist() for share in self.scoring_shares(batch.rollout, self.teacher_of(prompts))],
                batch.rollout.lengths.tolist(),
            ),
            "microbatch_shapes": len(self.passes.shapes),
            **timer.seconds,
            "peak_memory_gib": accelerator.peak_memory_bytes() / 2**30,
        }

    def served(self, step: int) -> list[int]:
        """Return the branches that ``step`` serves, as indices into the table."""
        counts = self.plan.table.schedule.counts(step, self.args.global_batch_size)
        return [branch for branch, count in enumerate(counts) if count]

    def generate(self, prompts: PromptBatch) -> RolloutBatch:
        """Return responses to this data-parallel rank's share of ``prompts``."""
        share = _share(len(prompts))
        token_ids = [prompts.prompts[place].token_ids for place in share]
        return self.engine.generate(token_ids, torch.tensor([prompts.indices[i] for i in share]), step=self.step)

    def score(self, rollout: RolloutBatch, prompts: PromptBatch) -> ScoredBatch:
        """Score the responses with student and teachers, and return the global batch, the same on every rank.

        Each rank gathers all responses once and scores a share of about the same cost as every other rank's.
        """
        layout = Layout.current()
        whole, branches = gather_rollouts(rollout, layout), torch.tensor(prompts.branches)
        teacher_of = self.teacher_of(prompts)
        shares = self.scoring_shares(whole, teacher_of)
        own = shares[layout.data.rank]
        part = whole.take(own)
        student = score_tokens(self.passes, self.model, part, self.method.student_request(part, self.step))
        teacher = self.score_by_teachers(part, self.method.teacher_request(student), teacher_of, own)
        found = {
            "teacher_logprobs": teacher.logprobs,
            "student_logprobs": student.logprobs,
            "student_entropies": student.entropies,
            "accepted": self.method.accepted(part, self.step, student, teacher),
        }
        return ScoredBatch(
            whole,
            branches,
            **{name: x if x is None else join_rows(x, shares, layout.data.group) for name, x in found.items()},
            prompt_ids=tuple(prompt.id for prompt in prompts.prompts),
            categories=tuple(prompt.category for prompt in prompts.prompts),
        )

    def teacher_of(self, prompts: PromptBatch) -> Tensor:
        """Return the teacher of each prompt, [N] int64 indices into the plan's teachers."""
        return torch.tensor([self.plan.teacher_of[branch] for branch in prompts.branches])

    def scoring_shares(self, whole: RolloutBatch, teacher_of: Tensor) -> list[Tensor]:
        """Return the rows that each data-parallel rank scores, balanced for each teacher and for all together."""
        ranks = Layout.current().data.size
        shares: list[list[int]] = [[] for _ in range(ranks)]
        loads = [0] * ranks
        for number in teacher_of.unique().tolist():
            rows = (teacher_of == number).nonzero().flatten()
            for share, places in zip(shares, self.passes.shares(whole.lengths[rows].tolist(), loads), strict=True):
                share += rows[places].tolist()
        return [torch.tensor(sorted(share), dtype=torch.int64) for share in shares]

    def score_by_teachers(
        self, part: RolloutBatch, request: ScoreRequest, teacher_of: Tensor, own: Tensor
    ) -> TokenScores:
        """Score each sample with the teacher of its branch.

        Args:
            part: The rows ``own`` of the global batch.
            request: The request for these rows.
            teacher_of: [N] int64, the teacher of each row of the global batch. All ranks pass through all of them.
            own: [M] int64.
        """
        answers = []
        for number in self.teachers.in_order(teacher_of.tolist()):
            teacher, rows = self.teachers.activate(number), (teacher_of[own] == number).nonzero().flatten()
            answers.append((rows, score_tokens(self.passes, teacher, part.take(rows), request.take(rows))))
        return TokenScores.merge(answers)

    def collect(self, prompts: PromptBatch) -> ScoredBatch:
        """Sample and score responses to further prompts within the step, for diagnostics."""
        with self.passes.uncounted():  # the run's records are the same with and without diagnostics
            return self.score(self.generate(prompts), prompts)

    def prefetch_teacher(self, step: int) -> None:
        """Start to load the teacher that ``step`` needs first into device memory."""
        needed = [self.plan.teacher_of[branch] for branch in self.served(step)]
        self.teachers.prefetch(self.teachers.in_order(needed)[0])

    def update(self, batch: ScoredBatch, weights: TrainingWeights) -> dict[str, Any]:
        """Do forward, backward and optimizer step; a step with non-finite loss or gradients changes nothing."""
        self.clear_gradients()
        done = accumulate_gradients(self.passes, self.model, batch, weights.coefficients, weights.advantage_floor)
        return {**self.apply_gradients(done.loss), "trained_tokens": done.tokens, "train_balance": done.balance}

    def step_warning(self, record: dict[str, Any]) -> str | None:
        """Return a warning if no response ended or rollout engine and trainer disagree more than usual, else None."""
        ends = named_ids(self.plan.tokenizer, self.plan.end_of_sequence_ids)
        warnings = [
            truncation_warning(record, SamplingSettings.of(self.args).max_response_length, ends),
            mismatch_warning(record, self.usual_mismatch),
        ]
        return "\n".join(filter(None, warnings)) or None

    def data_source(self, record: dict[str, Any]) -> str:
        """Return the name of the branch that the step served, or "mixed"."""
        return str(record["branch"])

    def describe_source(self, record: dict[str, Any]) -> str:
        """Return the branch with the teacher that scored it; of a mixed step, the branches without finite gaps."""
        names = self.plan.names
        served = [name for name in names if name == record["branch"]] or [
            name for name in names if not math.isfinite(record.get(f"gap_mean_{name}", 0.0))
        ]
        teachers = {name: self.plan.branch_teachers[names.index(name)].location.folder for name in served}
        named = ", ".join(f"branch {name} (teacher {folder})" for name, folder in teachers.items())
        return f" of {named}" if named else ""

    console_line = staticmethod(console_line)


def truncation_warning(record: dict[str, Any], max_response_length: int, ends: str) -> str | None:
    """Return a warning if every response of a step reached the length limit, else None.

    Args:
        record: The metrics of the step.
        max_response_length: The limit.
        ends: The end-of-sequence ids in words.
    """
    if record["truncated_fraction"] < 1:
        return None
    return (
        f"step {record['step']}: all responses reached --max-response-length {max_response_length}, none ended with an "
        f"end-of-sequence id, {ends}: raise the length if the model ends its answers, else look at these ids"
    )


def _share(count: int) -> range:
    """Return the indices of this data-parallel rank's prompts among ``count``: rank, rank + size, rank + 2 size, ..."""
    data = Layout.current().data
    return range(data.rank, count, data.size)
