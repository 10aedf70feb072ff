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
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_camopd.config.branch_settings import (
    FRACTION,
    POSITIVE,
    AlternatingSettings,
    BranchSettings,
    MixingSettings,
)
from megatron_camopd.config.settings import at_least
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
_RANGES = {"steps": at_least(1), "share": at_least(1), "mass_target": FRACTION, "feedback_scale": POSITIVE}
_RESERVED = ("mixed",)  # the metrics call a step of several branches "mixed"
_PROBES = "-probe"  # the prompts of the diagnostics of a branch are a stream with this suffix
_BROKEN = (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError, LookupError, TypeError, ArithmeticError)
"""Errors of reading a file: PyYAML raises most of them for values that contradict their own tags."""


@dataclass(frozen=True)
class BranchTable:
    """The branches of a run and the schedule over them.

    Attributes:
        branches: All branches, also those that no step serves; other code refers to them by their index here.
        mixes: Whether a step serves all branches in their shares, instead of one branch for its number of steps.
    """

    branches: tuple[BranchSpec, ...]
    mixes: bool

    @property
    def schedule(self) -> Schedule:
        """The schedule, which says how many prompts of each branch a step takes."""
        return MixedSchedule(self._weights) if self.mixes else AlternatingSchedule(self._weights)

    @property
    def served(self) -> tuple[int, ...]:
        """Indices in the table of the branches that at least one step of the schedule serves."""
        return tuple(place for place, weight in enumerate(self._weights) if weight)

    @property
    def _weights(self) -> list[int]:
        return [branch.share if self.mixes else branch.steps for branch in self.branches]


def branch_table(args: Namespace, *, mixes: bool) -> BranchTable:
    """Build the table from checked arguments.

    Args:
        args: The checked arguments.
        mixes: Whether the method serves all branches in every step.

    Raises:
        ConfigurationError: A flag or the file is wrong; the line names it, the value and what would be right.
    """
    file = BranchSettings.of(args).branches
    branches = two_branches(args, mixes) if file is None else _read_branches(Path(file), mixes)
    if mixes and not MixedSchedule([branch.share for branch in branches]).divides(args.global_batch_size):
        shares = ":".join(str(branch.share) for branch in branches)
        source = f"--mixing-ratio {shares}" if file is None else f"the shares {shares} of --branches {file}"
        raise ConfigurationError(f"--global-batch-size {args.global_batch_size}: does not divide as {source}")
    return BranchTable(branches, mixes)


def teacher_flag(args: Namespace, branch: BranchSpec) -> str:
    """Return the flag, or the place in the file, that an error about the teacher of ``branch`` names."""
    file = BranchSettings.of(args).branches
    return f"--{branch.name}-teacher-load" if file is None else f"--branches {file}: teacher of branch {branch.name!r}"


def prompts_flag(args: Namespace, branch: BranchSpec) -> str:
    """Return the flag, or the place in the file, that an error about the prompts of ``branch`` names."""
    file = BranchSettings.of(args).branches
    return f"--{branch.name}-prompts" if file is None else f"--branches {file}: prompts of branch {branch.name!r}"


def two_branches(args: Namespace, mixes: bool) -> tuple[BranchSpec, ...]:
    """Return the paper's two branches from their flags; a branch that no step serves has 0 steps or share 0."""
    flags, alternating = BranchSettings.of(args), AlternatingSettings.of(args)
    steps = (alternating.recovery_steps, alternating.preservation_steps)
    shares = MixingSettings.of(args).mixing_ratio or [1, 1]  # None with a method that does not mix
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
    names = [branch.name.casefold() for branch in branches]
    for branch in branches:
        if names.count(branch.name.casefold()) > 1:
            raise ConfigurationError(f"{flag}: two branches are called {branch.name!r}; give each a name of its own")
    return branches


def _load(path: Path, flag: str) -> Any:
    extension = path.suffix.lower()
    if extension not in (".json", ".yaml", ".yml"):
        raise ConfigurationError(f"{flag}: has the extension {path.suffix!r}; expected .json, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = _one_line(getattr(error, "strerror", None) or str(error))
        raise ConfigurationError(f"{flag}: cannot be read ({reason})") from error
    try:
        if extension == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, _UniqueKeys)  # noqa: S506  # a SafeLoader
    except _BROKEN as error:
        kind = "JSON" if extension == ".json" else "YAML"
        raise ConfigurationError(f"{flag}: cannot be read as {kind} ({_one_line(str(error))})") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # keys taken over with "<<" may be overridden
        _unique([(self.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != merge])
        return dict(super().construct_mapping(node, deep))


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return ``pairs`` as a dictionary.

    Raises:
        ValueError: A key is there twice, of which a dictionary would keep the last alone.
    """
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _one_line(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _branch(row: Any, number: int, folder: Path, mixes: bool, flag: str) -> BranchSpec:
    if not isinstance(row, dict):
        raise ConfigurationError(
            f"{flag}: branch {number} is {_one_line(repr(row), 60)}; it must be an object with a name"
        )
    name = row.get("name")
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        or name.casefold() in _RESERVED
        or name.endswith(_PROBES)
    ):
        raise ConfigurationError(
            f"{flag}: branch {number} has the name {_one_line(repr(name), 60)}; it must be letters, digits, - and _, "
            f"in quotes where YAML would read something else, not {', '.join(_RESERVED)}, and must not end in {_PROBES}"
        )
    where = f"{flag}: branch {name}"
    known = ("name", "prompts", "teacher", *_ALTERNATING, *_MIXING)
    for field in row:
        if field not in known:
            raise ConfigurationError(
                f"{where} has an unknown field {_one_line(repr(field), 60)}; known are {', '.join(known)}"
            )
        if field in (_ALTERNATING if mixes else _MIXING):
            only = "where branches take turns (--distill-method camopd)" if mixes else "with the mixed methods"
            raise ConfigurationError(f"{where}: {field} has an effect {only} alone; drop it")
    values = {field: _number(row[field], field, where) for field in _RANGES if field in row}
    if "score" in row:
        rules = {rule.value: rule for rule in ScoreRule}
        if row["score"] not in list(rules):
            raise ConfigurationError(
                f"{where} has score {_one_line(repr(row['score']), 60)}; it must be {' or '.join(rules)}"
            )
        values["score"] = rules[row["score"]]
    return BranchSpec(name=name, prompts=_prompts(row, folder, where), teacher=_teacher(row, folder, where), **values)


def _number(value: Any, field: str, where: str) -> Any:
    whole = field in ("steps", "share")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        kind = "a whole number" if whole else "a number (which YAML writes 0.5 or 1.0e-3)"
        raise ConfigurationError(f"{where} has {field} {_one_line(repr(value), 60)}; it must be {kind}")
    if not _RANGES[field].contains(value):
        raise ConfigurationError(f"{where} has {field} {_one_line(str(value), 60)}; it {_RANGES[field].describe()}")
    return value if whole else float(value)


def _prompts(row: Mapping[str, Any], folder: Path, where: str) -> tuple[str, ...]:
    prompts = row.get("prompts")
    files = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(files, list) or not files or not all(_is_path(file) for file in files):
        raise ConfigurationError(
            f"{where} has prompts {_one_line(repr(prompts), 80)}; it must be a file or a list of files"
        )
    paths = [str(folder / Path(file).expanduser()) for file in files]
    seen = [Path(path).resolve() for path in paths]
    for path, place in zip(paths, seen, strict=True):
        if seen.count(place) > 1:
            raise ConfigurationError(f"{where} lists the prompts {path} twice; list each file once")
    return tuple(paths)


def _teacher(row: Mapping[str, Any], folder: Path, where: str) -> str:
    teacher = row.get("teacher", INITIAL_TEACHER)
    if not _is_path(teacher):
        raise ConfigurationError(
            f"{where} has teacher {_one_line(repr(teacher), 80)}; it must be a folder or {INITIAL_TEACHER!r}"
        )
    # Absolute, so that it never reads as the word, and a resumed run finds it from any working directory.
    return INITIAL_TEACHER if teacher == INITIAL_TEACHER else os.path.abspath(folder / Path(teacher).expanduser())


def _is_path(value: Any) -> bool:
    """Return whether ``value`` can be a path: printable text that a file system takes."""
    return isinstance(value, str) and 0 < len(value) <= 1024 and value.isprintable()
