"""Samples that a run logged: ``samples.jsonl``, one sampled response a line, with the tokens of its largest gaps.

Fields that are missing or null, or not of the form below, are taken as unknown, and further fields are passed over: a
page about samples needs ``step``, ``branch``, ``prompt`` and ``response`` alone.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_camopd.config.words import shown
from megatron_camopd.errors import ConfigurationError
from tools.run_report.json_values import number, read_lines, whole_number

SAMPLES_FILE = "samples.jsonl"
# Characters that a page cannot show or that no file can hold: control characters but tab and line feed, halves of
# surrogate pairs.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Gap:
    """Gap of one response token.

    position: of the token in the response; start, end: its characters in the response's text, or None where it has
    none there; token: its text; value: log p(teacher) - log p(student), in nats.
    """

    position: int
    start: int | None
    end: int | None
    token: str
    value: float


@dataclass(frozen=True)
class Sample:
    """One response of the student at one step.

    prompt, response: text; lengths in tokens; score: of the selection, in nats a token; gap_mean, gap_abs_mean: over
    the response's tokens, in nats; largest_gaps: by position. None where the file does not say.
    """

    step: int
    branch: str
    prompt: str
    response: str
    id: str = ""
    category: str = ""
    prompt_length: int | None = None
    response_length: int | None = None
    truncated: bool | None = None
    score: float | None = None
    selected: bool | None = None
    gap_mean: float | None = None
    gap_abs_mean: float | None = None
    largest_gaps: tuple[Gap, ...] = ()


def read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    """Read the samples of a run, steps rising, and notes about the file.

    A step below the one before it comes of a run that went on from a checkpoint: samples of that step and later ones
    that were written before belong to steps that were trained again, and are left out.

    Raises:
        ConfigurationError: the file, or a line before its last, is malformed; names file and line.
    """
    lines, notes = read_lines(path)
    samples: list[Sample] = []
    left_out = 0
    for where, record in lines:
        sample = _sample(record, where)
        if samples and sample.step < samples[-1].step:
            kept = bisect_left(samples, sample.step, key=lambda each: each.step)
            left_out += len(samples) - kept
            del samples[kept:]
        samples.append(sample)
    if left_out:
        notes.append(f"{path}: {left_out:,} samples of steps that were trained again after a resumption were left out.")
    return samples, notes


def _sample(record: dict[str, Any], where: str) -> Sample:
    step = whole_number(record.get("step"))
    if step is None:
        wrong = shown(record.get("step"), limit=40)
        raise ConfigurationError(f"{where}: 'step' is {wrong}; it must be a whole number")
    texts = {}
    for name in ("branch", "prompt", "response"):
        if not isinstance(record.get(name), str):
            wrong = shown(record.get(name), limit=40)
            raise ConfigurationError(f"{where}: {name!r} is {wrong}; it must be a text")
        texts[name] = visible(record[name])
    gaps = record.get("largest_gaps")
    found = [_gap(each, len(texts["response"])) for each in gaps] if isinstance(gaps, list) else []
    return Sample(
        step,
        **texts,
        id=_name(record.get("id")),
        category=_name(record.get("category")),
        prompt_length=whole_number(record.get("prompt_length")),
        response_length=whole_number(record.get("response_length")),
        truncated=_truth(record.get("truncated")),
        score=number(record.get("score")),
        selected=_truth(record.get("selected")),
        gap_mean=number(record.get("gap_mean")),
        gap_abs_mean=number(record.get("gap_abs_mean")),
        largest_gaps=tuple(gap for gap in found if gap is not None),
    )


def _gap(entry: Any, length: int) -> Gap | None:
    """Return one entry of ``largest_gaps`` of a response of ``length`` characters; None without a finite gap."""
    if not isinstance(entry, dict):
        return None
    value, position = number(entry.get("gap")), whole_number(entry.get("position"))
    if value is None or position is None:
        return None
    start, end = whole_number(entry.get("start")), whole_number(entry.get("end"))
    if start is None or end is None or not 0 <= start < end <= length:
        start = end = None
    return Gap(position, start, end, _name(entry.get("token")), value)


def _name(value: Any) -> str:
    return "" if value is None else visible(str(value))


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def visible(text: str) -> str:
    """Return ``text`` with a visible character for each that a page cannot show; its length stays."""
    return _UNSEEN.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    return "\u2421" if code == 0x7F else "\ufffd"
