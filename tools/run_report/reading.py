"""A training run as its folder tells it: ``metrics.jsonl``, samples, scores of evaluations, the model's shape.

``metrics.jsonl`` is read strictly, since a figure of half a file would look like a figure of all of it: only a last
line without its line end, which a run that is still writing or was killed leaves, is passed over, with a note.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_camopd.config.words import one_line, printable, shown
from megatron_camopd.errors import ConfigurationError
from tools.run_report.branches import GAP_MEAN, MIXED, branch_names
from tools.run_report.json_values import is_number, number, read_file, read_lines, whole_number
from tools.run_report.samples import SAMPLES_FILE, Sample, read_samples

METRICS_FILE = "metrics.jsonl"
SCORES_FILE = "scores.json"
MOST_RUNS = 7  # as many as there are colours
LARGEST_STEP = 10**12  # axes of figures and tables have room for it
LONGEST_NAME = 200  # characters

Scores = dict[str, dict[str, float]]


@dataclass
class Run:
    """One training run.

    records: one dict a step, steps rising, values as JSON has them; scores: model -> test -> value (0..1); model: its
    shape in a few words, or ""; notes: what a reader of the page has to know about the data; samples: in the order of
    their file, steps rising.
    """

    label: str
    folder: Path
    records: list[dict[str, Any]]
    scores: Scores = field(default_factory=dict)
    model: str = ""
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """The branches that records and samples name, in the order in which they are shown."""
        of_samples = ({"branch": branch} for branch in {sample.branch for sample in self.samples})
        return branch_names([*self.records, *of_samples])


def read_runs(arguments: Sequence[str], scores: Sequence[str] = ()) -> list[Run]:
    """The runs that ``[LABEL=]DIR`` arguments name, with the scores of ``[LABEL=]FILE`` or those found beside them.

    Raises ConfigurationError for what is missing or malformed, and for two runs with one label.
    """
    if len(arguments) > MOST_RUNS:
        raise ConfigurationError(
            f"RUN: {len(arguments)} runs are given; at most {MOST_RUNS} can be told apart in a figure"
        )
    named = [split_label(argument) for argument in arguments]
    for label, count in Counter(label for label, _ in named).items():
        if count > 1:
            raise ConfigurationError(f"RUN: {count} runs are called {label!r}; name them apart with LABEL=DIR")
    files = _scores_files([(label, Path(path)) for label, path in named], scores)
    return [_read_run(label, Path(path), files) for label, path in named]


def split_label(argument: str) -> tuple[str, str]:
    """``LABEL=PATH`` -> (LABEL, PATH); a bare path is labelled with its last part. An existing path is taken whole."""
    label, equals, path = argument.partition("=")
    if equals and label and path and not Path(argument).exists():
        return label, path
    return Path(argument).resolve().name or argument, argument


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a metrics file and notes about it. Raises ConfigurationError naming file and line."""
    lines, notes = read_lines(path)
    records: list[dict[str, Any]] = []
    for where, record in lines:
        _check(record, records, where)
        records.append(_with_derived(record))
    if not records:
        raise ConfigurationError(f"{path}: holds no steps; a report needs at least one")
    return records, notes + _nulls(path, records)


def _check(record: dict[str, Any], before: Sequence[dict[str, Any]], where: str) -> None:
    step, branch = whole_number(record.get("step")), record.get("branch")
    if step is None or not 0 <= step <= LARGEST_STEP:
        found = shown(record.get("step")) if step is None else f"{step:.6g}"
        raise ConfigurationError(f"{where}: 'step' is {found}; it must be a whole number from 0 to {LARGEST_STEP:,}")
    if record.get("stage") == "sft":
        raise ConfigurationError(f"{where}: is of supervised fine-tuning; reports are about distillation")
    if not isinstance(branch, str) or not branch.isprintable() or not 1 <= len(branch) <= LONGEST_NAME:
        raise ConfigurationError(
            f"{where}: 'branch' is {shown(branch)}; it must be general, domain or mixed, or another branch's name"
        )
    if before and step <= before[-1]["step"]:
        raise ConfigurationError(f"{where}: step {step} comes after step {before[-1]['step']}; steps must rise")


def _with_derived(record: dict[str, Any]) -> dict[str, Any]:
    """Add the reverse KL of each branch of a mixed step, which its mean gap tells, and the tokens per second."""
    derived: dict[str, Any] = {}
    if record["branch"] == MIXED:
        for key, value in record.items():
            if key.startswith(GAP_MEAN) and (gap := number(value)) is not None:
                derived[f"reverse_kl_{key.removeprefix(GAP_MEAN)}"] = -gap
    seconds, tokens = sum(phase_seconds(record).values()), number(record.get("tokens"))
    if seconds > 0 and tokens is not None:
        derived["tokens_per_second"] = tokens / seconds
    return derived | record


def phase_seconds(record: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase: every ``time_NAME`` of the record."""
    found = {name.removeprefix("time_"): number(value) for name, value in record.items() if name.startswith("time_")}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def _nulls(path: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    counts = Counter(
        name
        for record in records
        for name, value in record.items()
        if value is None or (is_number(value) and number(value) is None)
    )
    if not counts:
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return [f"Not finite in some steps of {path}, and left out of the figures: {listed}."]


def _read_run(label: str, folder: Path, files: dict[str, Path | str]) -> Run:
    if not folder.is_dir():
        raise ConfigurationError(f"RUN: {folder} is no folder; it must be what a run's --save named")
    path = folder / METRICS_FILE
    if not path.exists():
        raise ConfigurationError(f"RUN: {folder} holds no {METRICS_FILE}; it must be what a run's --save named")
    records, notes = read_metrics(path)
    run = Run(label, folder, records, model=_model(folder), notes=notes)
    if (path := folder / SAMPLES_FILE).exists():
        run.samples, more = read_samples(path)
        run.notes += more
    found = files.get(label)
    if isinstance(found, Path):
        run.scores = read_scores(found)
    elif found:
        run.notes.append(found)
    return run


def _scores_files(runs: Sequence[tuple[str, Path]], given: Sequence[str]) -> dict[str, Path | str]:
    """Label -> file with that run's scores, or a note why there is none.

    A file in the folder above is taken only where a single run lies beside it: it does not say whose scores it holds.
    """
    found: dict[str, Path | str] = {}
    above = Counter((folder.resolve().parent) for _, folder in runs)
    for label, folder in runs:
        shared = folder.resolve().parent / SCORES_FILE
        if (own := folder / SCORES_FILE).exists():
            found[label] = own
        elif shared.is_file() and above[shared.parent] == 1:
            found[label] = shared
        elif shared.is_file():
            found[label] = (
                f"{label}: {shared} may belong to any of the runs beside it, and was left out (see --scores)."
            )
    labels = [label for label, _ in runs]
    for argument in given:
        label, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            if len(runs) > 1:
                raise ConfigurationError(f"--scores is {argument}; with several runs it must be LABEL=FILE")
            label, path = labels[0], argument
        if label not in labels:
            raise ConfigurationError(f"--scores: no run is called {label!r}; there are: {' '.join(labels)}")
        found[label] = Path(path)
    return found


def read_scores(path: Path) -> Scores:
    """Model -> test -> score (0..1). Raises ConfigurationError where the file is not of that form."""
    try:
        content = json.loads(read_file(path).decode())
    except ConfigurationError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: is no JSON ({one_line(str(error), limit=160)})") from error
    models = content.items() if isinstance(content, dict) else ()
    scores: Scores = {}
    for model, tests in models:
        values = {test: number(value) for test, value in tests.items()} if isinstance(tests, dict) else {}
        kept = {test: value for test, value in values.items() if value is not None}
        for test, value in kept.items():
            if not 0.0 <= value <= 1.0:
                place = f"{path}: {one_line(model, limit=80)}, {one_line(test, limit=80)}"
                raise ConfigurationError(f"{place} is {value}; scores must lie between 0 and 1")
        if kept:
            scores[printable(model, LONGEST_NAME)] = {
                printable(test, LONGEST_NAME): value for test, value in kept.items()
            }
    if not scores:
        raise ConfigurationError(f'{path}: holds no scores; it must be like {{"recovered": {{"general": 0.9}}}}')
    return scores


def _model(folder: Path) -> str:
    """The model in a few words, from the ``hf/config.json`` that a checkpoint carries; "" where there is none."""
    try:
        config = json.loads(read_file(folder / "hf" / "config.json").decode())
        return (
            f"{config['model_type']}, {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, "
            f"vocabulary {config['vocab_size']:,}"
        )
    except (ValueError, KeyError, TypeError, RecursionError):  # what is no file raises a ValueError as well
        return ""
