"""Everything that can be checked about a run before processes meet: teachers, tokenizer, prompts, saved state.

Each rank makes the same plan from the same files. Mistakes surface here, in seconds, and nothing has been
written or allocated yet.
"""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_camopd.checkpoint.assets import assets_dir, read_config
from megatron_camopd.checkpoint.qwen3 import architecture_args
from megatron_camopd.checkpoint.training_state import check_settings, read_state, settings_of
from megatron_camopd.checkpoint_directory import require_checkpoint
from megatron_camopd.data import ChatFormatter, PromptStream, read_prompts
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.schedule import Branch, BranchSchedule


@dataclass
class RunPlan:
    """The checked inputs of a run.

    ``settings`` are taken before Megatron fills in flags of its own; ``state`` is that of the checkpoint being
    resumed, or None.
    """

    settings: dict[str, Any]
    schedule: BranchSchedule
    teachers: dict[Branch, str]
    streams: dict[Branch, PromptStream]
    end_of_sequence_ids: list[int]
    state: dict[str, Any] | None


def plan_run(args: Namespace) -> RunPlan:
    """Read and check all inputs. Errors: ConfigurationError naming the flag or file."""
    schedule = BranchSchedule(args.recovery_steps, args.preservation_steps)
    settings, state = settings_of(args), None
    if args.resume:
        state = read_state(args)
        check_settings(settings, state["settings"], save=args.save)
        schedule.load_state_dict(state["schedule"])
    branches = [Branch.GENERAL] * (args.recovery_steps > 0) + [Branch.DOMAIN] * (args.preservation_steps > 0)
    teachers = _teacher_directories(args, branches, state)
    for branch, directory in teachers.items():
        _check_teacher(f"--{branch.value}-teacher-load", directory, args)
    tokenizer = load_tokenizer(args.load)
    streams = {branch: _stream(args, branch, tokenizer) for branch in branches}
    if state is not None:
        for branch, stream in streams.items():
            stream.load_state_dict(state["streams"][branch.value])
    return RunPlan(settings, schedule, teachers, streams, end_of_sequence_ids(args.load, tokenizer), state)


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer that travels with the Megatron checkpoint directory ``checkpoint``."""
    folder = assets_dir(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{folder}: no usable tokenizer ({reason}); convert the model again") from error


def end_of_sequence_ids(checkpoint: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: those of generation_config.json, or else the tokenizer's."""
    path = assets_dir(checkpoint) / "generation_config.json"
    ids = None
    if path.is_file():
        try:
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"{path}: is no JSON object ({error}); convert the model again") from error
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ConfigurationError(f"{path}: names no eos_token_id, nor does the tokenizer; responses could not end")
    return sorted(ids) if isinstance(ids, list) else [ids]


def _teacher_directories(args: Namespace, branches: list[Branch], state: dict[str, Any] | None) -> dict[Branch, str]:
    """Given by flags; else the initial student as domain teacher; a resumed run keeps the ones it started with."""
    given = {Branch.GENERAL: args.general_teacher_load, Branch.DOMAIN: args.domain_teacher_load}
    saved = state["teachers"] if state is not None else {}
    teachers = {}
    for branch in branches:
        directory = given[branch] or saved.get(branch.value) or args.load
        before = saved.get(branch.value, directory)
        if directory != before:
            raise ConfigurationError(
                f"--{branch.value}-teacher-load is {directory}, but the run in --save {args.save} started with {before}"
            )
        teachers[branch] = directory
    return teachers


def _check_teacher(flag: str, directory: str, args: Namespace) -> None:
    """A teacher must score the student's tokens: same architecture, same vocabulary, same token ids."""
    require_checkpoint(flag, directory)
    if Path(directory).samefile(args.load):
        return
    student, teacher = (architecture_args(read_config(assets_dir(where))) for where in (args.load, directory))
    for name, value in student.items():
        if teacher[name] != value:
            raise ConfigurationError(
                f"{flag} {directory}: {name.replace('_', '-')} is {teacher[name]}, the student's is {value}; "
                "teacher and student must be of one architecture"
            )
    student_ids, teacher_ids = (load_tokenizer(where).get_vocab() for where in (args.load, directory))
    if student_ids != teacher_ids:
        token = min(
            token for token in student_ids.keys() | teacher_ids.keys()
            if student_ids.get(token) != teacher_ids.get(token)
        )  # fmt: skip
        raise ConfigurationError(
            f"{flag} {directory}: its tokenizer gives {token!r} the id {teacher_ids.get(token)}, the student's gives "
            f"{student_ids.get(token)}; token ids must be equal"
        )


def _stream(args: Namespace, branch: Branch, tokenizer: PreTrainedTokenizerBase) -> PromptStream:
    flag = f"--{branch.value}-prompts"
    formatter = ChatFormatter(
        tokenizer,
        template_kwargs=args.chat_template_kwargs,
        max_prompt_length=args.max_prompt_length,
        overlong=args.overlong_prompts,
    )
    prompts = read_prompts(getattr(args, f"{branch.value}_prompts"), flag=flag)
    return PromptStream(prompts, formatter, seed=args.seed, name=branch.value)
