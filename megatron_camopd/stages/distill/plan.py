"""The plan of a distillation run: teachers, tokenizer, prompts and saved state, checked before processes meet.

Each rank makes the same plan from the same files. Mistakes are reported here within seconds, before anything is written
or allocated.
"""

import contextlib
import json
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_camopd.checkpoint.arguments import check_run_folders, student_checkpoint
from megatron_camopd.checkpoint.directory import CheckpointLocation, require_checkpoint
from megatron_camopd.checkpoint.origin import origin
from megatron_camopd.checkpoint.tokenizer import end_of_sequence, load_tokenizer
from megatron_camopd.checkpoint.training_state import comparing_state, read_state
from megatron_camopd.config.branch_resume import check_same_branches, kept_branches
from megatron_camopd.config.branch_settings import BranchSettings
from megatron_camopd.config.branches import BranchTable, branch_table, prompts_flag, teacher_flag
from megatron_camopd.config.checks import (
    check_positive,
    check_response_lengths,
    check_shared_batch,
    refuse_expert_parallelism,
    require_given,
)
from megatron_camopd.config.resume import check_kept_settings
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.data import (
    ChatFormatter,
    PromptSet,
    PromptStream,
    check_end_of_sequence,
    prompts_of_branch,
    read_prompts,
)
from megatron_camopd.data.chat import ChatSettings, PromptSettings
from megatron_camopd.data.row_report import RowReport
from megatron_camopd.objective.method import Method
from megatron_camopd.objective.registry import METHODS
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.schedule import INITIAL_TEACHER
from megatron_camopd.stages import description, metrics
from megatron_camopd.stages.distill import samples
from megatron_camopd.stages.distill.settings import DistillSettings
from megatron_camopd.stages.distill.teachers import Teacher, check_teacher, find_teacher
from megatron_camopd.stages.metrics import check_record_file
from megatron_camopd.stages.row_checks import check_prompts


@dataclass
class DistillPlan:
    """The checked inputs of a distillation run.

    Attributes:
        settings: The settings that a resumed run must keep, by argument name.
        method: The method chosen by ``--distill-method``.
        table: The branches and the schedule.
        branch_teachers: The teacher of each branch that any step serves, by the branch's index in the table. Branches
            may have equal checkpoints, which they may name differently.
        streams: Prompts of each branch that any step serves, by the branch's index in the table.
        probe_streams: The same prompts in a separate order, for diagnostics.
        tokenizer: The student's tokenizer.
        end_of_sequence_ids: The token ids that end a response.
        checkpoints: The checkpoints that are loaded, by the text that names their flag and folder in errors.
        origin: What the run started from (``checkpoint.origin``).
        state: The state in the checkpoint that is resumed, or None in a new run.
        reports: What the prompts of each of these branches come to, on the process that checks the rows.
    """

    settings: dict[str, Any]
    method: Method
    table: BranchTable
    branch_teachers: dict[int, Teacher]
    streams: dict[int, PromptStream]
    probe_streams: dict[int, PromptStream]
    tokenizer: PreTrainedTokenizerBase
    end_of_sequence_ids: list[int]
    checkpoints: dict[str, CheckpointLocation]
    origin: dict[str, Any]
    state: dict[str, Any] | None
    reports: dict[int, RowReport | None]

    @property
    def names(self) -> list[str]:
        """Names of the branches, in the order of the table."""
        return [branch.name for branch in self.table.branches]

    @property
    def teachers(self) -> list[Teacher]:
        """The teachers, equal checkpoints once."""
        return list({teacher.fingerprint: teacher for teacher in self.branch_teachers.values()}.values())

    @property
    def teacher_of(self) -> dict[int, int]:
        """Index in :attr:`teachers` of the teacher of each branch that any step serves."""
        places = {teacher.fingerprint: place for place, teacher in enumerate(self.teachers)}
        return {branch: places[teacher.fingerprint] for branch, teacher in self.branch_teachers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the plan, as JSON values; for streams it is their positions."""
        names = self.names
        return {
            "settings": self.settings,
            "origin": self.origin,
            "branches": kept_branches(self.table),
            "teachers": {names[branch]: teacher.state_dict() for branch, teacher in self.branch_teachers.items()},
            "streams": {names[branch]: stream.state_dict() for branch, stream in self.streams.items()},
        }

    def fingerprint(self) -> str:
        """Return a text that is equal on ranks with equal plans; ranks compare it before they train together."""
        plan = {**self.state_dict(), "resumed": self.state, "end_of_sequence_ids": self.end_of_sequence_ids}
        for teacher in plan["teachers"].values():
            del teacher["directory"]  # nodes may mount one file system under different paths
        return json.dumps(plan, sort_keys=True)


def check_arguments(args: Namespace) -> None:
    """Check files and folders, lengths and batch, and set ``args.resume`` and ``args.seq_length``."""
    check_positive(args, ("micro_batch_size", "global_batch_size", "train_iters"))
    refuse_expert_parallelism(args)
    table = _table(args)
    require_given(args, ("load", "save"))
    if BranchSettings.of(args).branches is None:
        served = {table.branches[place].name for place in table.served}
        needed = {"general": ("general_teacher_load", "general_prompts"), "domain": ("domain_prompts",)}
        require_given(args, [flag for name, flags in needed.items() if name in served for flag in flags])
    for name in (metrics.FILE, samples.FILE):
        check_record_file(args.save, name)
    check_run_folders(args, ("load", "general_teacher_load", "domain_teacher_load"), metrics.FILE)
    for place in table.served:
        teacher = table.branches[place].teacher
        if teacher != INITIAL_TEACHER and not args.resume:
            require_checkpoint(teacher_flag(args, table.branches[place]), teacher)
    check_response_lengths(args)
    check_shared_batch(args)


def plan_distillation(args: Namespace) -> DistillPlan:
    """Read and check all inputs.

    Raises:
        ConfigurationError: Names the flag or file.
    """
    table = _table(args)
    settings, state = args.kept_settings, read_state(args)
    branches = {place: table.branches[place] for place in table.served}
    with comparing_state(args, state):
        if state is not None:
            check_kept_settings(settings, state["settings"], save=args.save)
            check_same_branches(args, table, state)
        started_from = origin(args, state)
        found = {place: find_teacher(args, branch, state) for place, branch in branches.items()}
    # A run keeps the tokenizer, template and end-of-sequence ids that it started with.
    source = args.save if args.resume else args.load
    for place, teacher in found.items():
        check_teacher(teacher_flag(args, branches[place]), teacher.location, args, source)
    tokenizer = load_tokenizer(source)
    ends, named_in = end_of_sequence(source, tokenizer)
    check_end_of_sequence(tokenizer, ends, source=named_in, template_kwargs=ChatSettings.of(args).chat_template_kwargs)
    prompts = _read_prompts(args, table)
    reports = {place: check_prompts(found_prompts, _formatter(args, tokenizer), source)
               for place, found_prompts in prompts.items()}  # fmt: skip
    streams = {place: _stream(args, prompts[place], tokenizer, branches[place].name) for place in branches}
    probes = {place: _stream(args, prompts[place], tokenizer, f"{branches[place].name}-probe") for place in branches}
    with comparing_state(args, state):
        for place, stream in streams.items():
            if state is not None:
                stream.load_state_dict(state["streams"][branches[place].name])
    return DistillPlan(
        settings=settings,
        method=METHODS[DistillSettings.of(args).distill_method].build(args, table.branches),
        table=table,
        branch_teachers=found,
        streams=streams,
        probe_streams=probes,
        tokenizer=tokenizer,
        end_of_sequence_ids=ends,
        checkpoints={
            **student_checkpoint(args),
            **{
                f"{teacher_flag(args, branches[place])} {teacher.location.directory}": teacher.location
                for place, teacher in found.items()
            },
        },
        origin=started_from,
        state=state if args.resume else None,
        reports=reports,
    )


def _table(args: Namespace) -> BranchTable:
    return branch_table(args, mixes=METHODS[DistillSettings.of(args).distill_method].mixes_branches)


def _read_prompts(args: Namespace, table: BranchTable) -> dict[int, PromptSet]:
    """Return the prompts of each branch that any step serves, by its index in the table."""
    served = {place: table.branches[place] for place in table.served}
    found = {place: read_prompts(branch.prompts, flag=prompts_flag(args, branch)) for place, branch in served.items()}
    listed_by: dict[Path, list[str]] = {}
    for branch in table.branches:
        for file in branch.prompts:
            with contextlib.suppress(OSError, ValueError):  # of a branch that no step serves: its files are not read
                listed_by.setdefault(Path(file).resolve(), []).append(branch.name)
    return {place: prompts_of_branch(found[place], branch.name, listed_by) for place, branch in served.items()}


def _stream(args: Namespace, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, name: str) -> PromptStream:
    return PromptStream(prompts, _formatter(args, tokenizer), seed=args.seed, name=name)


def _formatter(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> ChatFormatter:
    prompt_settings = PromptSettings.of(args)
    return ChatFormatter(
        tokenizer,
        template_kwargs=ChatSettings.of(args).chat_template_kwargs,
        max_prompt_length=prompt_settings.max_prompt_length,
        overlong=prompt_settings.overlong_prompts,
    )


def describe(args: Namespace, plan: DistillPlan) -> list[str]:
    """Return the lines of a dry run."""
    share, microbatches = description.microbatches(args)
    prompt_settings, sampling = PromptSettings.of(args), SamplingSettings.of(args)
    method = DistillSettings.of(args).distill_method
    longest = prompt_settings.max_prompt_length + sampling.max_response_length
    prompts: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    names = plan.names
    for counts, number in plan.table.schedule.tally(args.train_iters, args.global_batch_size).items():
        steps["+".join(names[branch] for branch, count in enumerate(counts) if count)] += number
        prompts.update({names[branch]: number * count for branch, count in enumerate(counts) if count})
    return [
        *description.model_lines(args, teachers=len(plan.teachers)),
        f"method: {method}; {', '.join(f'{count} {kind}' for kind, count in steps.items())} steps",
        description.steps(args, plan.state),
        f"batch: {args.global_batch_size} prompts a step, {share} on a data-parallel rank; at most {microbatches} "
        "(what is selected is trained)",
        f"tokens: prompts up to {prompt_settings.max_prompt_length:,}, responses up to "
        f"{sampling.max_response_length:,}: at most {args.global_batch_size * longest:,} a step",
        f"rollouts: {RolloutSettings.of(args).rollout_engine}, temperature {sampling.rollout_temperature:g}",
        *(_branch_line(plan, branch) for branch in plan.streams),
        *(
            f"{names[branch]} prompts: {_rows(plan, branch, prompt_settings)}; {prompts[names[branch]]:,} drawn, "
            f"{prompts[names[branch]] / len(stream):.2f} epochs"
            for branch, stream in plan.streams.items()
        ),
        *notes(plan),
    ]


def notes(plan: DistillPlan) -> list[str]:
    """Return lines about what is not as the prompts may suggest, said once at the start."""
    reports = {plan.names[place]: report for place, report in plan.reports.items() if report is not None}
    return [f"{name} prompts: {line}" for name, report in reports.items() for line in report.notes()]


def _rows(plan: DistillPlan, place: int, prompt_settings: PromptSettings) -> str:
    """Return what the prompts of a branch come to in words; on a process that does not check them, their number."""
    report = plan.reports[place]
    if report is None:
        return f"{len(plan.streams[place]):,} rows"
    return report.line("--max-prompt-length", prompt_settings.overlong_prompts)


def _branch_line(plan: DistillPlan, place: int) -> str:
    """Return the line of a dry run about the branch at ``place`` in the table."""
    branch, teacher = plan.table.branches[place], plan.branch_teachers[place]
    rules = (
        f"share {branch.share}"
        if plan.table.mixes
        else f"{branch.steps} steps in a row, score {branch.score.value}, mass target {branch.mass_target:g}, "
        f"feedback scale {branch.feedback_scale:g}"
    )
    return f"{branch.name} teacher: {teacher.location.folder}{' (initial weights)' if teacher.initial else ''}; {rules}"
