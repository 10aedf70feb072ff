"""Prompts that Nemotron-Post-Training-Dataset-v1 holds back ("-" or nothing in their place), from where they came from.

A row of ``code`` names its question in ``metadata``: ``{"dataset": "taco", "split": "train", "index": "17"}`` is row
17, counted from 0, of that split of TACO (APPS, CodeContests, open-r1/codeforces); the data set's authors join them so
in the documentation of NeMo-Skills ("OpenReasoning"). For rows of any split a file of ``uuid`` and ``prompt`` can be
given, however it was made.

Memory: the questions of every split that a row names (35,000 of all four sets, some 70 MB), and all of the file.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.sources import RowSource, open_rows

_QUESTIONS, _BY_UUID = "--code-questions", "--prompts-by-uuid"


def _codeforces(row: Mapping[str, Any]) -> str | None:
    """The statement with its sections, as a contestant reads it."""
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


# Name in metadata, without an owner: (columns, further columns, the question of a row).
_DATA_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any]], Any]]] = {
    "taco": (("question",), (), lambda row: row["question"]),
    "apps": (("question",), (), lambda row: row["question"]),
    "code_contests": (("description",), (), lambda row: row["description"]),
    "codeforces": (("description",), ("input_format", "output_format", "examples", "note"), _codeforces),
}


class WithheldPrompts:
    """Looks up the prompt of a row that has none of its own."""

    def __init__(self, code_questions: Sequence[str], by_uuid: Path | None) -> None:
        """Errors: ConfigurationError for what is not NAME=SOURCE, or a source not there or with other columns."""
        self._sources = dict(map(_named, code_questions))
        self._described = {name: self._open(name).describe() for name in self._sources}
        self._questions: dict[tuple[str, str], list[Any]] = {}
        self._by_uuid: dict[str, str] = {}
        if by_uuid is not None:
            file = open_rows(str(by_uuid), flag=_BY_UUID, columns=("uuid", "prompt"), progress="withheld prompts")
            self._described[_BY_UUID] = file.describe()
            self._by_uuid = {str(row.values["uuid"]): row.values["prompt"] for row in file}

    def describe(self, split: str = "code") -> dict[str, Any]:
        """For the manifest: what each source is that ``split`` may use; ``code`` uses all."""
        return {name: source for name, source in self._described.items() if split == "code" or name == _BY_UUID}

    def find(self, split: str, uuid: Any, metadata: Any) -> str | None:
        """The prompt, or None where no source has it. Errors: ConfigurationError for a split that is not there."""
        text = self._by_uuid.get(str(uuid))
        if text is None and split == "code":
            text = self._question(metadata)
        return text if isinstance(text, str) else None

    def _question(self, metadata: Any) -> str | None:
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
        columns, optional, _ = _DATA_SETS[name]
        revision = self._described[name]["revision"] if split is not None else None
        return open_rows(
            self._sources[name], flag=_QUESTIONS, columns=columns, optional=optional, split=split, revision=revision,
            prefixes=None if split is None else (split,), progress=None if split is None else f"{name} {split}",
        )  # fmt: skip


def _named(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    name = name.rpartition("/")[2]
    if name not in _DATA_SETS or not source:
        raise ConfigurationError(
            f"{_QUESTIONS} {text}: must be NAME=SOURCE with a NAME of {', '.join(_DATA_SETS)}; SOURCE is a folder of "
            "its files, or its name on the hub"
        )
    return name, source
