"""Everything that can be checked about a run before processes meet: teachers, tokenizer, prompts, saved state.

Each rank makes the same plan from the same files. Mistakes surface here, in seconds, and nothing has been
written or allocated yet.
"""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_camopd.checkpoint.arguments import check_run_folders
from megatron_camopd.checkpoint.assets import assets_dir, read_config
from megatron_camopd.checkpoint.directory import CheckpointLocation, require_checkpoint
from megatron_camopd.checkpoint.qwen3 import architecture_args
from megatron_camopd.checkpoint.tokenizer import end_of_sequence_ids, load_tokenizer
from megatron_camopd.checkpoint.training_state import read_state
from megatron_camopd.config.checks import check_positive, check_response_lengths, check_shared_batch, require_given
from megatron_camopd.config.resume import check_kept_settings
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.data import ChatFormatter, PromptSet, PromptStream, read_prompts
from megatron_camopd.data.chat import ChatSettings, PromptSettings
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective.method import Method
from megatron_camopd.objective.registry import METHODS
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.schedule import Branch, Schedule, schedule_of
from megatron_camopd.stages import description
from megatron_camopd.stages.distill.settings import DistillSettings


@dataclass(frozen=True)
class Teacher:
    """A teacher's checkpoint, and what it is told by should it move."""

    location: CheckpointLocation
    fingerprint: str

    def state_dict(self) -> dict[str, Any]:
        """For the training state: the run keeps this very checkpoint, whatever its folder holds later."""
        where = self.location
        return {"directory": str(where.directory), "iteration": where.iteration, "fingerprint": self.fingerprint}


@dataclass
class DistillPlan:
    """The checked inputs of a run.

    ``settings`` are taken before Megatron fills in flags of its own; ``state`` is that of the checkpoint being
    resumed, or None. ``probe_streams`` walk the same prompts in an order of their own, for diagnostics; whoever uses
    them says where.
    """

    settings: dict[str, Any]
    method: Method
    schedule: Schedule
    teachers: dict[Branch, Teacher]
    streams: dict[Branch, PromptStream]
    probe_streams: dict[Branch, PromptStream]
    end_of_sequence_ids: list[int]
    state: dict[str, Any] | None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the plan, as JSON values: settings, teachers, the place in every stream."""
        return {
            "settings": self.settings,
            "schedule": self.schedule.state_dict(),
            "teachers": {branch.value: teacher.state_dict() for branch, teacher in self.teachers.items()},
            "streams": {branch.value: stream.state_dict() for branch, stream in self.streams.items()},
        }

    def fingerprint(self) -> str:
        """The same text on every rank whose plan is the same: what ranks compare before they train together."""
        plan = {**self.state_dict(), "resumed": self.state, "end_of_sequence_ids": self.end_of_sequence_ids}
        for teacher in plan["teachers"].values():
            del teacher["directory"]  # one file system may be mounted in two places
        return json.dumps(plan, sort_keys=True)


def check_arguments(args: Namespace) -> None:
    """Check files and folders, lengths and batch; sets ``args.resume`` and ``args.seq_length``."""
    schedule = schedule_of(args)
    idle = {f"{branch.value}_{what}" for branch in Branch if branch not in schedule.branches
            for what in ("teacher_load", "prompts")}  # fmt: skip
    needed = ("load", "save", "general_teacher_load", "general_prompts", "domain_prompts")
    require_given(args, [name for name in needed if name not in idle])
    check_run_folders(args, ("load", "general_teacher_load", "domain_teacher_load"))
    check_positive(args, ("micro_batch_size", "global_batch_size", "train_iters"))
    check_response_lengths(args)
    check_shared_batch(args)
    schedule.composition(0, args.global_batch_size)


def plan_distillation(args: Namespace) -> DistillPlan:
    """Read and check all inputs. Errors: ConfigurationError naming the flag or file."""
    schedule = schedule_of(args)
    settings, state = args.kept_settings, None
    if args.resume:
        state = read_state(args)
        check_kept_settings(settings, state["settings"], save=args.save)
        schedule.load_state_dict(state["schedule"])
    teachers = {branch: _find_teacher(args, branch, state) for branch in schedule.branches}
    # A run keeps the tokenizer, template and end-of-sequence ids that it started with.
    source = args.save if args.resume else args.load
    for branch, teacher in teachers.items():
        _check_teacher(f"--{branch.value}-teacher-load", teacher.location, args, source)
    tokenizer = load_tokenizer(source)
    prompts = {branch: _read_prompts(args, branch) for branch in schedule.branches}
    streams = {branch: _stream(args, rows, tokenizer, branch.value) for branch, rows in prompts.items()}
    probes = {branch: _stream(args, rows, tokenizer, f"{branch.value}-probe") for branch, rows in prompts.items()}
    if state is not None:
        for branch, stream in streams.items():
            stream.load_state_dict(state["streams"][branch.value])
    return DistillPlan(
        settings,
        METHODS[DistillSettings.of(args).distill_method].build(args),
        schedule,
        teachers,
        streams,
        probes,
        end_of_sequence_ids(source, tokenizer),
        state,
    )


def _find_teacher(args: Namespace, branch: Branch, state: dict[str, Any] | None) -> Teacher:
    """Given by the flag; else the initial student as domain teacher; a resumed run keeps the ones it started with."""
    flag, given = f"--{branch.value}-teacher-load", getattr(args, f"{branch.value}_teacher_load")
    if state is None:
        location = require_checkpoint(flag if given else "--load", given or args.load)
        return Teacher(location, location.fingerprint())
    saved = state["teachers"][branch.value]
    location = CheckpointLocation(Path(given or saved["directory"]), saved["iteration"])
    if not location.complete:
        raise ConfigurationError(
            f"{flag} {location.directory}: {location.folder.name}, the {branch.value} teacher of the run in --save "
            f"{args.save}, is not there; give the folder that holds it now"
        )
    if location.fingerprint() != saved["fingerprint"]:
        raise ConfigurationError(
            f"{flag} {location.directory}: {location.folder.name} is not the checkpoint that the run in --save "
            f"{args.save} started with (then in {saved['directory']}); give that one"
        )
    return Teacher(location, saved["fingerprint"])


def _check_teacher(flag: str, location: CheckpointLocation, args: Namespace, student: str) -> None:
    """A teacher must score the student's tokens: same architecture, same vocabulary, same token ids."""
    directory = location.directory
    if directory.samefile(student):
        return
    wanted, found = (architecture_args(read_config(assets_dir(where))) for where in (student, directory))
    if found["max_position_embeddings"] < args.seq_length:
        raise ConfigurationError(
            f"{flag} {directory}: has {found['max_position_embeddings']} positions, --seq-length is {args.seq_length}"
        )
    for name in wanted.keys() - {"max_position_embeddings"}:
        if found[name] != wanted[name]:
            raise ConfigurationError(
                f"{flag} {directory}: {name.replace('_', '-')} is {found[name]}, the student's is {wanted[name]}; "
                "teacher and student must be of one architecture"
            )
    student_ids, teacher_ids = (load_tokenizer(where).get_vocab() for where in (student, directory))
    if student_ids != teacher_ids:
        token = min(
            token for token in student_ids.keys() | teacher_ids.keys()
            if student_ids.get(token) != teacher_ids.get(token)
        )  # fmt: skip
        raise ConfigurationError(
            f"{flag} {directory}: its tokenizer gives {token!r} the id {teacher_ids.get(token)}, the student's gives "
            f"{student_ids.get(token)}; token ids must be equal"
        )


def _read_prompts(args: Namespace, branch: Branch) -> PromptSet:
    return read_prompts(getattr(args, f"{branch.value}_prompts"), flag=f"--{branch.value}-prompts")


def _stream(args: Namespace, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, name: str) -> PromptStream:
    prompt_settings = PromptSettings.of(args)
    formatter = ChatFormatter(
        tokenizer,
        template_kwargs=ChatSettings.of(args).chat_template_kwargs,
        max_prompt_length=prompt_settings.max_prompt_length,
        overlong=prompt_settings.overlong_prompts,
    )
    return PromptStream(prompts, formatter, seed=args.seed, name=name)


def describe(args: Namespace, plan: DistillPlan) -> list[str]:
    """Return the lines of a dry run."""
    share, microbatches = description.microbatches(args)
    prompt_settings, sampling = PromptSettings.of(args), SamplingSettings.of(args)
    method = DistillSettings.of(args).distill_method
    longest = prompt_settings.max_prompt_length + sampling.max_response_length
    prompts: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for step in range(args.train_iters):
        composition = plan.schedule.composition(step, args.global_batch_size)
        steps["+".join(branch.value for branch in composition)] += 1
        prompts.update({branch.value: count for branch, count in composition.items()})
    return [
        *description.model_lines(args, teachers=len(plan.teachers)),
        f"method: {method}; {', '.join(f'{count} {kind}' for kind, count in steps.items())} steps",
        description.steps(args, plan.state),
        f"batch: {args.global_batch_size} prompts a step, {share} on a data-parallel rank; at most {microbatches} "
        f"microbatches of {args.micro_batch_size} (what is selected is trained)",
        f"tokens: prompts up to {prompt_settings.max_prompt_length:,}, responses up to "
        f"{sampling.max_response_length:,}: at most {args.global_batch_size * longest:,} a step",
        f"rollouts: {RolloutSettings.of(args).rollout_engine}, temperature {sampling.rollout_temperature:g}",
        *(
            f"{branch.value} prompts: {len(stream):,} rows, {prompts[branch.value]:,} drawn, "
            f"{prompts[branch.value] / len(stream):.2f} epochs"
            for branch, stream in plan.streams.items()
        ),
    ]
