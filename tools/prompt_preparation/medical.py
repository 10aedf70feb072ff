"""Medical questions: MedMCQA, MedReason, Medical-R1-Distill (English), m23k, in the template of the paper's Figure 7.

Each source gives a sample of its distinct questions (``selection``). Questions are the same if their words are, without
options; a question of an earlier source is not taken again. Gold answers and explanations must not enter a prompt. The
gold text of a row is:

* a sentence of at least 40 letters and digits of its explanation, reasoning or response that is not part of the
  question or its options;
* the answer to an open question, if it has at least 8 letters and digits, as whole words;
* words that announce a solution ("Answer: B", "Explanation:").

A row whose question contains gold text is skipped and counted. At the end the written prompts are searched for the gold
text of the rows they came from; if any is found, the command fails and nothing is written.

The sample of a finished source is saved beside the output; a command that was interrupted continues with the next
source.
"""

import argparse
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_camopd.config.program import cleaned_up
from megatron_camopd.config.words import check_file
from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.output import OutputSet
from tools.prompt_preparation.selection import Sample, normalized, priority
from tools.prompt_preparation.sources import RowSource, open_rows

SYSTEM = (
    "You are a careful medical reasoning assistant. Provide educational medical information, mention uncertainty when "
    "relevant, and recommend professional medical care for diagnosis or treatment decisions."
)
CHOICE = "Please reason step by step and give the final answer choice at the end."
OPEN = (
    "Please reason step by step and answer clearly. Do not present the answer as a substitute for professional medical "
    "advice."
)
_LETTERED = re.compile(r"^\s*\(?([A-J])[.):]\s*(.+?)\s*$", re.MULTILINE)
_INLINE = re.compile(r"\(([A-J])\)\s*(.+?)(?=\s*\([A-J]\)|\s*$)", re.DOTALL)
_HEADING = re.compile(r"\s*(answer choices|options)\s*:?\s*$", re.IGNORECASE)
_ANNOUNCED = re.compile(r"\b(the )?(correct |final )?answer\s*(is|:)\s*\(?[A-J]\b|\bexplanation\s*:", re.IGNORECASE)
_SENTENCES = re.compile(r"[.!?\n]+")
_MIN_GOLD_SENTENCE, _MIN_GOLD_ANSWER = 40, 8  # letters and digits

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold text.

    Attributes:
        text: The question as the source has it.
        options: (letter, option) pairs; empty for an open question, and where the text contains the options.
        explanations: Explanation, reasoning or response: gold.
        answer: The answer to an open question: gold.
    """

    text: str
    options: list[tuple[str, str]]
    explanations: list[str]
    answer: str

    @property
    def is_choice(self) -> bool:
        """Whether the question has options."""
        return bool(self.options or options_in(self.text)[1])

    @property
    def key(self) -> str:
        """Normalized text without options: equal for two spellings of one question."""
        return normalized(options_in(self.text)[0]) or normalized(self.text)

    @property
    def prompt(self) -> str:
        """The text of the user message."""
        options = [f"{letter}. {option}" for letter, option in self.options]
        return "\n".join([self.text, *options, CHOICE if self.is_choice else OPEN])


@dataclass(frozen=True, slots=True)
class Source:
    """A data set of questions.

    Attributes:
        hub: (name, configuration) on the hub.
        count: Default number of questions.
        columns: Columns that every row must have.
        optional: Columns that are read where a row has them.
        identity: Column with the row's id; empty: the row's place.
        read: Makes a row's question, or None if the row has none.
    """

    hub: tuple[str, str | None]
    count: int
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    identity: str
    read: Callable[[Values], Question | None]


def options_in(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a question into the text before its options (lines, or "(A) ... (B) ...") and (letter, option) pairs."""
    for pattern in (_LETTERED, _INLINE):
        found = list(pattern.finditer(text))
        if len(found) > 1 and [match[1] for match in found] == list("ABCDEFGHIJ")[: len(found)]:
            return _HEADING.sub("", text[: found[0].start()]).strip(), [(match[1], match[2]) for match in found]
    return text, []


def _medmcqa(values: Values) -> Question | None:
    """Read a row of MedMCQA."""
    options = [(letter, _text(values[f"op{letter.lower()}"])) for letter in "ABCD"]
    if not all(option for _, option in options):
        return None
    return Question(_text(values["question"]), options, [_text(values.get("exp"))], "")


def _medreason(values: Values) -> Question | None:
    """Read a row of MedReason."""
    options = [(letter, option) for letter, option in _LETTERED.findall(_text(values.get("options")))]
    answer, _, explanation = _text(values["answer"]).partition("Explanation:")
    return Question(_text(values["question"]), options, [explanation, _text(values.get("reasoning"))], answer)


def _medical_r1(values: Values) -> Question | None:
    """Read a row of Medical-R1-Distill."""
    gold = [_text(values.get(name)) for name in ("reasoning (reasoning_content)", "response (content)")]
    return Question(_text(values["question"]), [], gold, "")


def _m23k(values: Values) -> Question | None:
    """Read a row of m23k."""
    gold = [_text(values.get(name)) for name in ("reasoning", "distilled_answer_string")]
    return Question(_text(values["prompt"]), [], gold, _text(values.get("answer_string")))


SOURCES = {
    "medmcqa": Source(
        ("openlifescienceai/medmcqa", None), 4000, ("question", "opa", "opb", "opc", "opd"), ("id", "exp", "cop"), "id",
        _medmcqa,
    ),
    "medreason": Source(
        ("UCSC-VLAA/MedReason", None), 3000, ("question", "answer"),
        ("options", "reasoning", "id_in_dataset", "dataset_name"), "", _medreason,
    ),
    "medical-r1": Source(
        ("FreedomIntelligence/Medical-R1-Distill-Data", "en"), 2000, ("question", "response (content)"),
        ("reasoning (reasoning_content)",), "", _medical_r1,
    ),
    "m23k": Source(
        ("UCSC-VLAA/m23k-tokenized", None), 1000, ("prompt", "answer_string"),
        ("reasoning", "distilled_answer_string", "answer_letter", "source"), "", _m23k,
    ),
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-command."""
    for name, source in SOURCES.items():
        parser.add_argument(f"--{name}", default=source.hub[0], metavar="SOURCE",
                            help=f"file, folder or data set (default: {source.hub[0]})")  # fmt: skip
        parser.add_argument(f"--{name}-count", type=int, default=source.count, metavar="N",
                            help=f"its questions, 0 leaves it out (default: {source.count})")  # fmt: skip


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write ``prompts.jsonl``; return the counts.

    Raises:
        ConfigurationError: A flag, a source or the output is wrong.
    """
    wanted = {name: getattr(args, f"{name.replace('-', '_')}_count") for name in SOURCES}
    for name, count in wanted.items():
        if count < 0:
            raise ConfigurationError(f"--{name}-count {count}: must be at least 0")
    wanted = {name: count for name, count in wanted.items() if count}
    if not wanted:
        raise ConfigurationError("--medmcqa-count 0 and all other counts 0: at least one source must be asked for")
    if args.revision is not None and len(wanted) > 1:
        raise ConfigurationError(f"--revision {args.revision}: which of {', '.join(wanted)}? set the other counts to 0")
    sources = {name: _open(args, name) for name in wanted}
    identity = {
        "command": "medical", "counts": wanted, "seed": args.seed, "max_characters": args.max_characters,
        "sources": {name: source.describe() for name, source in sources.items()},
    }  # fmt: skip
    with OutputSet(args.output, overwrite=args.overwrite) as output:
        if output.is_current(identity):
            return {"up to date": str(args.output), **output.manifest["counts"]}
        counts: dict[str, Counter[str]] = {name: Counter() for name in wanted}
        taken: set[str] = set()
        chosen: dict[str, Question] = {}
        state = State(args.output / ".partial.state.json", identity)
        for name, source in sources.items():
            found = state.found(name, counts[name])
            if found is None:
                found = _sample(args, name, source, wanted[name], taken, counts[name])
                state.note(name, found, counts[name])
            taken.update(question.key for _, question in found)
            chosen.update(found)
        output.write_rows("prompts.jsonl", (_row(identifier, question) for identifier, question in chosen.items()))
        with (args.output / ".partial.prompts.jsonl").open(encoding="utf-8") as file:
            check_no_gold(map(json.loads, file), chosen)
        shown = {name: {"asked for": wanted[name], **dict(sorted(counted.items()))} for name, counted in counts.items()}
        output.finish({"counts": shown, "row_ids": list(chosen)})
        state.remove()
    return shown


def leak(prompt: str, question: Question) -> str | None:
    """Return gold text of ``question`` that ``prompt`` contains, or None; text of the question itself is not gold."""
    asked = normalized(" ".join([question.text, *(option for _, option in question.options)]))
    written = normalized(prompt)
    for explanation in question.explanations:
        for sentence in map(normalized, _SENTENCES.split(explanation)):
            if len(sentence.replace(" ", "")) >= _MIN_GOLD_SENTENCE and sentence not in asked and sentence in written:
                return sentence
    announced = _ANNOUNCED.search(prompt)
    if announced:
        return announced.group()
    answer = normalized(question.answer)
    if not question.is_choice and len(answer.replace(" ", "")) >= _MIN_GOLD_ANSWER and f" {answer} " in f" {written} ":
        return answer
    return None


def check_no_gold(rows: Iterable[dict[str, Any]], chosen: dict[str, Question]) -> None:
    """Search the written prompts for the gold text of the rows they came from.

    Raises:
        ConfigurationError: A prompt contains gold text; the message names the row.
    """
    for row in rows:
        system, user = (message["content"] for message in row["messages"])
        found = leak(user, chosen[row["id"]]) if system == SYSTEM else system
        if found is not None:
            raise ConfigurationError(
                f"--output: prompt {row['id']} holds a gold answer or explanation ({found[:60]!r}); this is a fault of "
                "prepare_prompts, nothing was written"
            )


def _open(args: argparse.Namespace, name: str) -> RowSource:
    """Open a source."""
    source, given = SOURCES[name], getattr(args, name.replace("-", "_"))
    configuration = source.hub[1] if given == source.hub[0] else None
    return open_rows(
        given, flag=f"--{name}", columns=source.columns, optional=source.optional, split="train", name=configuration,
        revision=args.revision, progress=name,
    )  # fmt: skip


def _sample(
    args: argparse.Namespace, name: str, rows: RowSource, count: int, taken: set[str], counts: Counter[str]
) -> list[tuple[str, Question]]:
    """Sample ``count`` questions of a source whose keys are not ``taken``; return them with their ids."""
    source, sample = SOURCES[name], Sample(count)
    for row in rows:
        counts["rows"] += 1
        question = source.read(row.values)
        key = question.key if question else ""
        if question is None or not key:
            counts["without a question or an option"] += 1
        elif key in taken:
            counts["in an earlier source"] += 1
        elif args.max_characters is not None and len(question.prompt) > args.max_characters:
            counts["too long"] += 1
        elif leak(question.prompt, question) is not None:
            counts["question holds its answer"] += 1
        else:
            identity = str(row.values.get(source.identity) or row.id)
            sample.offer(priority(args.seed, name, key), identity, (f"{name}-{identity}", question))
    counts["duplicates of kept questions"], counts["sampled"] = sample.duplicates, len(sample)
    if len(sample) < count:
        raise ConfigurationError(
            f"--{name}-count {count}: {getattr(args, name.replace('-', '_'))} has {len(sample)} distinct usable "
            f"questions in {counts['rows']} rows; ask for fewer"
        )
    return sample.items()


class State:
    """The samples of finished sources, saved for a command that continues after an interruption."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path, self._identity = path, json.loads(json.dumps(identity))
        self._sources: dict[str, Any] = {}
        check_file("--output", path, "the saved state of an interrupted command")
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["identity"] == self._identity:
                self._sources = state["sources"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # no state, or an incomplete one: begin anew

    def found(self, name: str, counts: Counter[str]) -> list[tuple[str, Question]] | None:
        """Return a finished source's questions and fill in its ``counts``; None if it is not finished."""
        if name not in self._sources:
            return None
        counts.update(self._sources[name]["counts"])
        questions = self._sources[name]["questions"]
        return [
            (identifier, Question(text, [(letter, option) for letter, option in options], explanations, answer))
            for identifier, text, options, explanations, answer in questions
        ]

    def note(self, name: str, found: list[tuple[str, Question]], counts: Counter[str]) -> None:
        """Save the questions and counts of a finished source."""
        questions = [[identifier, *dataclasses.astuple(question)] for identifier, question in found]
        self._sources[name] = {"counts": counts, "questions": questions}
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        state = json.dumps({"identity": self._identity, "sources": self._sources})
        try:
            with cleaned_up(lambda: temporary.unlink(missing_ok=True)):
                temporary.write_text(state, encoding="utf-8")
                os.replace(temporary, self._path)
        except OSError as error:
            raise ConfigurationError(f"--output: {self._path} cannot be written ({error.strerror})") from None

    def remove(self) -> None:
        """Remove the state, when the output is complete."""
        self._path.unlink(missing_ok=True)


def _row(identifier: str, question: Question) -> dict[str, Any]:
    """Return the prompt row of a question."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.prompt}]
    category = next(name for name in SOURCES if identifier.startswith(f"{name}-"))
    return {"id": identifier, "messages": messages, "category": category, "data_type": "medical"}


def _text(value: Any) -> str:
    """Return a stripped text; empty for any other value."""
    return value.strip() if isinstance(value, str) else ""
