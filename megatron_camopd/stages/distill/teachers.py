"""The teachers of a distillation run: found, recognised in a resumed run, and checked against the student."""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_camopd.checkpoint.assets import assets_dir, read_model
from megatron_camopd.checkpoint.consistency import check_config
from megatron_camopd.checkpoint.directory import CheckpointLocation, require_checkpoint
from megatron_camopd.checkpoint.integrity import check_readable
from megatron_camopd.checkpoint.tokenizer import load_tokenizer
from megatron_camopd.config.branch_settings import BranchSettings
from megatron_camopd.config.branches import teacher_flag
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.schedule import INITIAL_TEACHER, BranchSpec


@dataclass(frozen=True)
class Teacher:
    """Checkpoint of a teacher.

    Attributes:
        location: Where the checkpoint is.
        fingerprint: Text that identifies the checkpoint also after its folder has moved.
        initial: Whether it is the student's initial checkpoint because no other was named.
    """

    location: CheckpointLocation
    fingerprint: str
    initial: bool = dataclasses.field(default=False, compare=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of the run stores, so that the run resumes with exactly this teacher."""
        where = self.location
        return {
            "directory": str(where.directory),
            "iteration": where.iteration,
            "fingerprint": self.fingerprint,
            "initial": self.initial,
        }


def find_teacher(args: Namespace, branch: BranchSpec, state: dict[str, Any] | None) -> Teacher:
    """Return the configured teacher of ``branch`` or, in a continued run, the teacher that the run started with.

    Args:
        args: The validated arguments.
        branch: A branch that a step serves.
        state: The saved state of the run, or None if it is new.

    Raises:
        ConfigurationError: There is no such checkpoint, or it is not that of the run.
    """
    flag, initial = teacher_flag(args, branch), branch.teacher == INITIAL_TEACHER
    if state is None:
        location = require_checkpoint("--load" if initial else flag, args.load if initial else branch.teacher)
        return Teacher(location, location.fingerprint(), initial)
    saved = state["teachers"][branch.name]
    file = BranchSettings.of(args).branches
    if initial and file is not None and not saved.get("initial", saved["directory"] == args.load):
        raise ConfigurationError(
            f"--branches {file}: teacher of branch {branch.name} is {INITIAL_TEACHER}, but the checkpoint in --save "
            f"{args.save} was made with {saved['directory']}; use that, or another --save to start a new run"
        )
    directory = saved["directory"] if initial or not branch.teacher else branch.teacher
    location = CheckpointLocation(Path(directory), saved["iteration"])
    if not location.complete:
        raise ConfigurationError(
            f"{flag} {location.directory}: {location.folder.name}, the {branch.name} teacher of the run in --save "
            f"{args.save}, is not there; give the folder that holds it now"
        )
    if "origin" not in state:
        raise ConfigurationError(
            f"--save {args.save}: an earlier version saved this run, and what it noted of the teachers covers only "
            "parts of them; finish it with that version, or give another --save to start a new run"
        )
    if location.fingerprint() != saved["fingerprint"]:
        raise ConfigurationError(
            f"{flag} {location.directory}: {location.folder.name} is not the checkpoint that the run in --save "
            f"{args.save} started with (then in {saved['directory']}); give that one"
        )
    return Teacher(location, saved["fingerprint"], saved.get("initial", False))


def check_teacher(flag: str, location: CheckpointLocation, args: Namespace, student: str) -> None:
    """Check that a teacher can be read and can score the student's tokens.

    Args:
        flag: The flag that names the teacher.
        location: The teacher's checkpoint.
        args: The validated arguments.
        student: The checkpoint directory of the student.

    Raises:
        ConfigurationError: The checkpoint is damaged, or its architecture, vocabulary or token ids are not the
            student's.
    """
    check_readable(location, flag)
    check_config(location.folder)
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
    """Return the family of the model in ``checkpoint`` as the first item, then Megatron's arguments for the model."""
    family, arch = read_model(assets_dir(checkpoint))
    return {"model_type": family.model_type, **family.megatron_arguments(arch)}
