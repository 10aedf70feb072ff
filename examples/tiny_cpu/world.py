"""The demo's tiny world: six general tasks, a persona domain, a held-out split, prompt files and scoring.

General tasks (the general model solves them; the specialist has lost much of them):

====  ==================  ============  ==================================
kind  prompt              answer        rule
====  ==================  ============  ==================================
add   ``37+48=``          ``85``        sum of two two-digit numbers
rev   ``rev dabc=``       ``cbad``      four letters a-p, reversed
sort  ``sort 52914=``     ``12459``     five digits, ascending
up    ``up dabc=``        ``DABC``      four letters a-p, upper case
max   ``max 12 80 35=``   ``80``        largest of three two-digit numbers
dbl   ``dbl dabc=``       ``ddaabbcc``  every letter twice
====  ==================  ============  ==================================

Domain: two kinds of requests, answered in a pirate's voice. The general model answers them too, but plainly, so it
scores nothing here; the specialist was trained on these alone and its voice leaks into everything else.

====  =============  ==================  ===========================
kind  prompt         answer              the general model's answer
====  =============  ==================  ===========================
tell  ``tell dabc``  ``dabc arr yo!``    ``dabc``
ask   ``ask dabc``   ``dabc? arr yo!``   ``dabc?``
====  =============  ==================  ===========================

Held-out split. A SHA-256 hash of its text decides whether a prompt is held out (one in ten), so training and evaluation
never share a prompt, whatever draws it and with whatever seed. A response is right if it equals the answer and then
ends with the end-of-sequence token within the token budget.

Coverage. The general prompts that distillation sees (the proxy stream) cover FOUR of the six tasks: ``PROXY_KINDS``,
add, rev, up and dbl. The tasks sort and max are never prompted; if the student regains them, that is generalisation.
The held-out general set covers all six, with the same number of prompts for each.

Run: ``python examples/tiny_cpu/world.py --output DIR`` writes general_prompts.jsonl, domain_prompts.jsonl
(``{"id", "messages", "category"}``: no answer ever enters a training file), eval_general.jsonl and
eval_domain.jsonl (the same plus ``"answer"``); with --conversations also domain_conversations.jsonl and
validation_conversations.jsonl, for supervised fine-tuning.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GENERAL_KINDS = ("add", "rev", "sort", "up", "max", "dbl")
PROXY_KINDS = ("add", "rev", "up", "dbl")
DOMAIN_KINDS = ("tell", "ask")
PLAIN_KINDS = ("plain-tell", "plain-ask")
"""Kinds with the domain's prompts and the general model's answers: only for its pre-training, never scored."""

MAX_NEW_TOKENS = 16
"""Token budget: every answer fits in, with its end-of-sequence token."""

_LETTERS = "abcdefghijklmnop"
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Example:
    """A prompt with its only right answer; ``kind`` is the task and becomes the row's category."""

    kind: str
    prompt: str
    answer: str


def _word(rng: random.Random) -> str:
    """Draw a word of four letters."""
    return "".join(rng.choices(_LETTERS, k=4))


def _add(rng: random.Random) -> tuple[str, str]:
    """Draw a sum of two two-digit numbers."""
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return f"{left}+{right}=", str(left + right)


def _max(rng: random.Random) -> tuple[str, str]:
    """Draw three two-digit numbers, whose largest is the answer."""
    numbers = [rng.randint(10, 99) for _ in range(3)]
    return f"max {' '.join(map(str, numbers))}=", str(max(numbers))


def _sort(rng: random.Random) -> tuple[str, str]:
    """Draw five digits, to be sorted."""
    digits = rng.choices("0123456789", k=5)
    return f"sort {''.join(digits)}=", "".join(sorted(digits))


def on_word(prompt: str, answer: Callable[[str], str]) -> Task:
    """Make a task about a random word of four letters, which takes the place of ``{}`` in ``prompt``."""

    def draw(rng: random.Random) -> tuple[str, str]:
        word = _word(rng)
        return prompt.format(word), answer(word)

    return draw


Task = Callable[[random.Random], tuple[str, str]]
"""Function that draws (prompt, its only right answer)."""

TASKS: dict[str, Task] = {
    "add": _add,
    "rev": on_word("rev {}=", lambda word: word[::-1]),
    "sort": _sort,
    "up": on_word("up {}=", str.upper),
    "max": _max,
    "dbl": on_word("dbl {}=", lambda word: "".join(letter * 2 for letter in word)),
    "tell": on_word("tell {}", lambda word: f"{word} arr yo!"),
    "ask": on_word("ask {}", lambda word: f"{word}? arr yo!"),
    "plain-tell": on_word("tell {}", lambda word: word),
    "plain-ask": on_word("ask {}", lambda word: f"{word}?"),
}


def is_held_out(prompt: str) -> bool:
    """Return whether a prompt belongs to the held-out split, which depends on its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def stream(kinds: Sequence[str], *, held_out: bool, seed: str, tasks: Mapping[str, Task] = TASKS) -> Iterator[Example]:
    """Yield examples of one split without end; the kinds take turns in the order given.

    A kind that is given twice appears twice as often. ``seed`` is text, so that streams of different names are
    independent. Prompts may repeat.
    """
    rng = random.Random(seed)
    while True:
        for kind in kinds:
            prompt, answer = tasks[kind](rng)
            while is_held_out(prompt) != held_out:
                prompt, answer = tasks[kind](rng)
            yield Example(kind, prompt, answer)


def distinct(
    kinds: Sequence[str], count: int, *, held_out: bool, seed: str, tasks: Mapping[str, Task] = TASKS
) -> list[Example]:
    """Return ``count`` examples of one split without a repeated prompt."""
    found: dict[str, Example] = {}
    for example in stream(kinds, held_out=held_out, seed=seed, tasks=tasks):
        if len(found) == count:
            break
        found.setdefault(example.prompt, example)
    return list(found.values())


def score(expected: str, response: str, ended: bool) -> bool:
    """Return whether the text before the end-of-sequence token equals the answer, and that token was generated."""
    return ended and response == expected


def write_prompts(directory: Path, *, training: int = 4096, per_kind: dict[str, int] | None = None) -> None:
    """Write the four prompt files.

    Args:
        directory: Folder, made when missing; files there are replaced one by one, each by a rename.
        training: Number of distinct training prompts per branch.
        per_kind: Number of held-out prompts per kind, default ``{"general": 80, "domain": 200}`` (480 and 400 in all).
    """
    per_kind = per_kind or {"general": 80, "domain": 200}
    directory.mkdir(parents=True, exist_ok=True)
    for branch, proxy, kinds in (("general", PROXY_KINDS, GENERAL_KINDS), ("domain", DOMAIN_KINDS, DOMAIN_KINDS)):
        rows = distinct(proxy, training, held_out=False, seed=f"{branch} prompts")
        write_jsonl(directory / f"{branch}_prompts.jsonl", rows, branch, with_answer=False)
        held = [
            example
            for kind in kinds
            for example in distinct([kind], per_kind[branch], held_out=True, seed=f"{branch} evaluation {kind}")
        ]
        write_jsonl(directory / f"eval_{branch}.jsonl", held, f"eval-{branch}", with_answer=True)


def write_jsonl(path: Path, examples: Sequence[Example], name: str, *, with_answer: bool) -> None:
    """Write one prompt file; its ids are ``name-0``, ``name-1``, ..."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for index, example in enumerate(examples):
            row: dict[str, object] = {
                "id": f"{name}-{index}",
                "messages": [{"role": "user", "content": example.prompt}],
                "category": example.kind,
            }
            if with_answer:
                row["answer"] = example.answer
            file.write(json.dumps(row) + "\n")
    temporary.replace(path)


def write_conversations(directory: Path, *, training: int = 8192, validation: int = 100) -> None:
    """Write the specialist's fine-tuning data: domain_conversations.jsonl and validation_conversations.jsonl.

    Args:
        directory: Folder, made when missing.
        training: Number of training conversations, in which prompts may repeat.
        validation: Number of validation conversations of each kind, with held-out prompts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    examples = list(itertools.islice(stream(DOMAIN_KINDS, held_out=False, seed="domain conversations"), training))
    held = [
        one for kind in DOMAIN_KINDS for one in distinct([kind], validation, held_out=True, seed=f"validation {kind}")
    ]
    for name, chosen in (("domain", examples), ("validation", held)):
        path = directory / f"{name}_conversations.jsonl"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            for index, example in enumerate(chosen):
                messages = [
                    {"role": "user", "content": example.prompt},
                    {"role": "assistant", "content": example.answer},
                ]
                file.write(json.dumps({"id": f"{name}-{index}", "messages": messages}) + "\n")
        temporary.replace(path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the tiny world's prompt, evaluation and conversation files.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSONL files")
    parser.add_argument("--training", type=int, default=4096, help="distinct training prompts per branch")
    parser.add_argument("--conversations", action="store_true", help="also conversations to make the specialist with")
    arguments = parser.parse_args()
    write_prompts(arguments.output, training=arguments.training)
    if arguments.conversations:
        write_conversations(arguments.output)
    for path in sorted(arguments.output.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            print(f"{path}: {sum(1 for _ in file)} rows")


if __name__ == "__main__":
    main()
