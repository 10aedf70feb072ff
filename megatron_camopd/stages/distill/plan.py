"""Everything that can be checked about a run before processes meet: teachers, tokenizer, prompts, saved state.

Each rank makes the same plan from the same files. Mistakes surface here, in seconds, and nothing has been
written or allocated yet.
"""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_camopd.checkpoint.assets import assets_dir, read_model
from megatron_camopd.checkpoint.directory import CheckpointLocation, require_checkpoint
from megatron_camopd.checkpoint.tokenizer import end_of_sequence_ids, load_tokenizer
from megatron_camopd.checkpoint.training_state import check_settings, read_state, settings_of
from megatron_camopd.data import ChatFormatter, PromptSet, PromptStream, read_prompts
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective.builder import build_method
from megatron_camopd.objective.method import Method
from megatron_camopd.schedule import Branch, Schedule, schedule_of


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
class RunPlan:
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


def plan_run(args: Namespace) -> RunPlan:
    """Read and check all inputs. Errors: ConfigurationError naming the flag or file."""
    schedule = schedule_of(args)
    settings, state = settings_of(args), None
    if args.resume:
        state = read_state(args)
        check_settings(settings, state["settings"], save=args.save)
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
    return RunPlan(
        settings, build_method(args), schedule, teachers, streams, probes, end_of_sequence_ids(source, tokenizer), state
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
    wanted, found = (_architecture_arguments(where) for where in (student, directory))
    if found["max_position_embeddings"] < args.seq_length:
        raise ConfigurationError(
            f"{flag} {directory}: has {found['max_position_embeddings']} positions, --seq-length is {args.seq_length}"
        )
    for name in wanted:
        if name != "max_position_embeddings" and found[name] != wanted[name]:
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


def _architecture_arguments(checkpoint: str | Path) -> dict[str, Any]:
    """The family of the model in ``checkpoint``, which comes first, and Megatron's arguments for it."""
    family, arch = read_model(assets_dir(checkpoint))
    return {"model_type": family.model_type, **family.megatron_arguments(arch)}


def _read_prompts(args: Namespace, branch: Branch) -> PromptSet:
    return read_prompts(getattr(args, f"{branch.value}_prompts"), flag=f"--{branch.value}-prompts")


def _stream(args: Namespace, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, name: str) -> PromptStream:
    formatter = ChatFormatter(
        tokenizer,
        template_kwargs=args.chat_template_kwargs,
        max_prompt_length=args.max_prompt_length,
        overlong=args.overlong_prompts,
    )
    return PromptStream(prompts, formatter, seed=args.seed, name=name)
