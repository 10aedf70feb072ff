"""The table of branches of a run: the paper's two, from their flags, or any number, from ``--branches FILE``.

The file is JSON or YAML, as its extension says:

    branches:
      - {name: general, prompts: general.jsonl, teacher: /ckpt/general, steps: 3, mass_target: 0.8, feedback_scale: 2}
      - {name: medical, prompts: [medical.jsonl], teacher: initial, steps: 1, score: positive}

``teacher`` is a Megatron checkpoint directory or "initial", the student's initial weights. With ``--distill-method
camopd`` branches take turns, each for its number of ``steps``. The other methods serve all branches in every step, in
proportion to their ``share``. Relative paths are relative to the folder of the file.
"""

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_camopd.config.branch_settings import AlternatingSettings, BranchSettings, MixingSettings
from megatron_camopd.config.settings import Range, at_least
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.schedule import (
    INITIAL_TEACHER,
    AlternatingSchedule,
    Branch,
    BranchSpec,
    MixedSchedule,
    Schedule,
    ScoreRule,
    check_two_branch_steps,
)

_ALTERNATING = ("steps", "score", "mass_target", "feedback_scale")
_MIXING = ("share",)
_RANGES = {
    "steps": at_least(1),
    "share": at_least(1),
    "mass_target": Range(0, 1, open_low=True),
    "feedback_scale": Range(low=0, open_low=True, words="must be a positive number"),
}
_RESERVED = ("mixed",)  # the metrics call a step of several branches "mixed"


@dataclass(frozen=True)
class BranchTable:
    """The branches of a run and the schedule over them.

    Attributes:
        branches: All branches, also those that no step serves; other code refers to them by their index here.
        schedule: The schedule, which says how many prompts of each branch a step takes.
        mixes: Whether a step serves all branches instead of one.
    """

    branches: tuple[BranchSpec, ...]
    schedule: Schedule
    mixes: bool

    @property
    def served(self) -> tuple[int, ...]:
        """Indices in the table of the branches that at least one step of the schedule serves."""
        weights = [branch.share if self.mixes else branch.steps for branch in self.branches]
        return tuple(place for place, weight in enumerate(weights) if weight)


def branch_table(args: Namespace, *, mixes: bool) -> BranchTable:
    """Build the table from checked arguments.

    Args:
        args: The checked arguments.
        mixes: Whether the method serves all branches in every step.

    Raises:
        ConfigurationError: A flag or the file is wrong; the line names it, the value and what would be right.
    """
    file = BranchSettings.of(args).branches
    branches = _two_branches(args, mixes) if file is None else _read_branches(Path(file), mixes)
    if not mixes:
        return BranchTable(branches, AlternatingSchedule([branch.steps for branch in branches]), mixes)
    schedule = MixedSchedule([branch.share for branch in branches])
    if not schedule.divides(args.global_batch_size):
        shares = ":".join(str(branch.share) for branch in branches)
        source = f"--mixing-ratio {shares}" if file is None else f"the shares {shares} of --branches {file}"
        raise ConfigurationError(f"--global-batch-size {args.global_batch_size}: does not divide as {source}")
    return BranchTable(branches, schedule, mixes)


def teacher_flag(args: Namespace, branch: BranchSpec) -> str:
    """Return the flag, or the place in the file, that an error about the teacher of ``branch`` names."""
    file = BranchSettings.of(args).branches
    return f"--{branch.name}-teacher-load" if file is None else f"--branches {file}: teacher of {branch.name}"


def prompts_flag(args: Namespace, branch: BranchSpec) -> str:
    """Return the flag, or the place in the file, that an error about the prompts of ``branch`` names."""
    file = BranchSettings.of(args).branches
    return f"--{branch.name}-prompts" if file is None else f"--branches {file}: prompts of {branch.name}"


def _two_branches(args: Namespace, mixes: bool) -> tuple[BranchSpec, ...]:
    """Return the paper's two branches from their flags; a branch that no step serves has 0 steps or share 0."""
    flags, alternating = BranchSettings.of(args), AlternatingSettings.of(args)
    steps = (alternating.recovery_steps, alternating.preservation_steps)
    shares = MixingSettings.of(args).mixing_ratio or [1, 1]
    if mixes and not sum(shares):
        ratio = ":".join(map(str, shares))
        raise ConfigurationError(f"--mixing-ratio {ratio}: must be whole numbers of 0 or more, at least one positive")
    if not mixes:
        check_two_branch_steps(*steps)
    general = BranchSpec(
        name=Branch.GENERAL.value,
        prompts=tuple(flags.general_prompts or ()),
        teacher=flags.general_teacher_load or "",
        steps=steps[0],
        share=shares[0],
        score=Branch.GENERAL.score,
        mass_target=alternating.general_mass_target,
        feedback_scale=alternating.general_feedback_scale,
    )
    domain = BranchSpec(
        name=Branch.DOMAIN.value,
        prompts=tuple(flags.domain_prompts or ()),
        teacher=flags.domain_teacher_load or INITIAL_TEACHER,
        steps=steps[1],
        share=shares[1],
        score=Branch.DOMAIN.score,
        mass_target=alternating.domain_mass_target,
        feedback_scale=alternating.domain_feedback_scale,
    )
    return general, domain


def _read_branches(path: Path, mixes: bool) -> tuple[BranchSpec, ...]:
    flag = f"--branches {path}"
    content = _load(path, flag)
    rows = content.get("branches") if isinstance(content, dict) and set(content) == {"branches"} else None
    if not isinstance(rows, list) or not rows:
        raise ConfigurationError(f'{flag}: must hold {{"branches": [...]}} with at least one branch, and nothing else')
    branches = tuple(_branch(row, number, path.parent, mixes, flag) for number, row in enumerate(rows, start=1))
    names = [branch.name for branch in branches]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"{flag}: two branches are called {name!r}; give each a name of its own")
    return branches


def _load(path: Path, flag: str) -> Any:
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ConfigurationError(f"{flag}: has the extension {path.suffix!r}; expected .json, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
        raise ConfigurationError(f"{flag}: cannot be read as {kind} ({reason})") from error


def _branch(row: Any, number: int, folder: Path, mixes: bool, flag: str) -> BranchSpec:
    if not isinstance(row, dict):
        raise ConfigurationError(f"{flag}: branch {number} is {row!r}; it must be an object with a name")
    name = row.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in _RESERVED:
        raise ConfigurationError(
            f"{flag}: branch {number} has the name {name!r}; it must be letters, digits, - and _, and not "
            f"{', '.join(_RESERVED)}"
        )
    where = f"{flag}: branch {name}"
    known = ("name", "prompts", "teacher", *_ALTERNATING, *_MIXING)
    for field in row:
        if field not in known:
            raise ConfigurationError(f"{where} has an unknown field {field!r}; known are {', '.join(known)}")
        if field in (_ALTERNATING if mixes else _MIXING):
            only = "where branches take turns (--distill-method camopd)" if mixes else "with the mixed methods"
            raise ConfigurationError(f"{where}: {field} has an effect {only} alone; drop it")
    values = {field: _number(row[field], field, where) for field in _RANGES if field in row}
    if "score" in row:
        rules = {rule.value: rule for rule in ScoreRule}
        if row["score"] not in list(rules):
            raise ConfigurationError(f"{where} has score {row['score']!r}; it must be {' or '.join(rules)}")
        values["score"] = rules[row["score"]]
    return BranchSpec(name=name, prompts=_prompts(row, folder, where), teacher=_teacher(row, folder, where), **values)


def _number(value: Any, field: str, where: str) -> Any:
    whole = field in ("steps", "share")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        kind = "a whole number" if whole else "a number"
        raise ConfigurationError(f"{where} has {field} {value!r}; it must be {kind}")
    if not _RANGES[field].contains(value):
        raise ConfigurationError(f"{where} has {field} {value}; it {_RANGES[field].describe()}")
    return value if whole else float(value)


def _prompts(row: Mapping[str, Any], folder: Path, where: str) -> tuple[str, ...]:
    prompts = row.get("prompts")
    files = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigurationError(f"{where} has prompts {prompts!r}; it must be a file or a list of files")
    return tuple(str(folder / file) for file in files)


def _teacher(row: Mapping[str, Any], folder: Path, where: str) -> str:
    teacher = row.get("teacher", INITIAL_TEACHER)
    if not isinstance(teacher, str) or not teacher:
        raise ConfigurationError(f"{where} has teacher {teacher!r}; it must be a folder or {INITIAL_TEACHER!r}")
    return teacher if teacher == INITIAL_TEACHER else str(folder / teacher)
