"""Prompts that Nemotron-Post-Training-Dataset-v1 withholds ("-" or nothing in their place), from their sources.

A row of ``code`` names its question in ``metadata``: ``{"dataset": "taco", "split": "train", "index": "17"}`` is row
17, counted from 0, of that split of TACO (APPS, CodeContests, open-r1/codeforces). The documentation of NeMo-Skills
("OpenReasoning") by the data set's authors joins them in this way. For rows of any split, a file with the columns
``uuid`` and ``prompt`` can be given.

Memory: the questions of every split that a row names (35,000 of all four sets, some 70 MB), and the whole file.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.sources import RowSource, open_rows

_QUESTIONS, _BY_UUID = "--code-questions", "--prompts-by-uuid"


def _codeforces(row: Mapping[str, Any]) -> str | None:
    """Return the problem statement with its sections, as a participant of the contest reads it."""
    if not isinstance(row["description"], str):
        return None
    parts = [row["description"]]
    parts += [f"{title}\n\n{row[key]}" for title, key in (("Input", "input_format"), ("Output", "output_format"))
              if row.get(key)]  # fmt: skip
    examples = [example for example in row.get("examples") or () if isinstance(example, dict)]
    if examples:
        shown = (f"{key.title()}\n\n{example[key]}" for example in examples for key in ("input", "output")
                 if example.get(key) is not None)  # fmt: skip
        parts.append("\n\n".join(["Examples", *shown]))
    if row.get("note"):
        parts.append(f"Note\n\n{row['note']}")
    return "\n\n".join(parts)


# Name in the metadata, without its owner: (required columns, optional columns, function that returns a row's question).
_DATA_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any]], Any]]] = {
    "taco": (("question",), (), lambda row: row["question"]),
    "apps": (("question",), (), lambda row: row["question"]),
    "code_contests": (("description",), (), lambda row: row["description"]),
    "codeforces": (("description",), ("input_format", "output_format", "examples", "note"), _codeforces),
}


class WithheldPrompts:
    """Look-up of the prompts of rows that have none of their own."""

    def __init__(self, code_questions: Sequence[str], by_uuid: Path | None) -> None:
        """Open the sources, and read the file of prompts by uuid.

        Raises:
            ConfigurationError: An entry is not NAME=SOURCE, or a source does not exist or lacks a column.
        """
        self._sources = dict(map(_named, code_questions))
        self._described = {name: self._open(name).describe() for name in self._sources}
        self._questions: dict[tuple[str, str], list[Any]] = {}
        self._by_uuid: dict[str, str] = {}
        if by_uuid is not None:
            file = open_rows(str(by_uuid), flag=_BY_UUID, columns=("uuid", "prompt"), progress="withheld prompts")
            self._described[_BY_UUID] = file.describe()
            self._by_uuid = {str(row.values["uuid"]): row.values["prompt"] for row in file}

    def describe(self, split: str = "code") -> dict[str, Any]:
        """Return a description, for the manifest, of each source that ``split`` may use; ``code`` uses all."""
        return {name: source for name, source in self._described.items() if split == "code" or name == _BY_UUID}

    def find(self, split: str, uuid: Any, metadata: Any) -> str | None:
        """Return the prompt of a row, or None if no source has it.

        Raises:
            ConfigurationError: The source does not have the split that ``metadata`` names.
        """
        text = self._by_uuid.get(str(uuid))
        if text is None and split == "code":
            text = self._question(metadata)
        return text if isinstance(text, str) else None

    def _question(self, metadata: Any) -> str | None:
        """Return the question that a row's metadata names, or None."""
        try:
            found = json.loads(metadata) if isinstance(metadata, str) else metadata
            name = found["dataset"].rpartition("/")[2]
            split, index = found["split"], int(found["index"])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return None
        if name not in self._sources or not isinstance(split, str):
            return None
        if (name, split) not in self._questions:
            question = _DATA_SETS[name][2]
            rows = self._open(name, split)
            self._questions[name, split] = [question(row.values) for row in rows]
        questions = self._questions[name, split]
        return questions[index] if 0 <= index < len(questions) else None

    def _open(self, name: str, split: str | None = None) -> RowSource:
        """Open a data set of questions, or one split of it at the commit that was described."""
        columns, optional, _ = _DATA_SETS[name]
        revision = self._described[name]["revision"] if split is not None else None
        return open_rows(
            self._sources[name], flag=_QUESTIONS, columns=columns, optional=optional, split=split, revision=revision,
            prefixes=None if split is None else (split,), progress=None if split is None else f"{name} {split}",
        )  # fmt: skip


def _named(text: str) -> tuple[str, str]:
    """Split NAME=SOURCE."""
    name, _, source = text.partition("=")
    name = name.rpartition("/")[2]
    if name not in _DATA_SETS or not source:
        raise ConfigurationError(
            f"{_QUESTIONS} {text}: must be NAME=SOURCE with a NAME of {', '.join(_DATA_SETS)}; SOURCE is a folder of "
            "its files, or its name on the hub"
        )
    return name, source
