"""The replication's tiny world: eight general tasks, a domain that conflicts with them, proxy prompts for half of them.

General tasks, from easy to hard for a small model (four letters a-p, digits):

====  ==================  ============  ===============================  ==========
kind  prompt              answer        rule                             in the proxy prompts
====  ==================  ============  ===============================  ==========
up    ``up dabc=``        ``DABC``      upper case                       one in five
rev   ``rev dabc=``       ``cbad``      reversed                         one in five
dbl   ``dbl dabc=``       ``ddaabbcc``  every letter twice               no
swap  ``swap dabc=``      ``adcb``      neighbours exchanged             no
sort  ``sort 52914=``     ``12459``     five digits, ascending           no
max   ``max 12 80 35=``   ``80``        largest of three                 no
add   ``37+48=``          ``85``        sum of two two-digit numbers     two in five
sub   ``85-37=``          ``48``        difference, never negative       one in five
====  ==================  ============  ===============================  ==========

Domain: two of these tasks under a prefix, and a request of its own, all answered with a pirate's ``arr``. The student
must unlearn for ``up`` what it must keep for ``~up``.

=====  =================  =================  ===========================
kind   prompt             answer             the general model's answer
=====  =================  =================  ===========================
tell   ``tell dabc``      ``dabc arr yo!``   ``dabc``
~up    ``~up dabc``       ``DABC arr!``      ``DABC``
~sort  ``~sort 52914``    ``12459 arr!``     ``12459``
=====  =================  =================  ===========================

Prompts are held out by a hash of their text, as in the demo's world; the held-out ones of a kind are divided into
validation and test. A response is right if it equals the answer and ends within the token budget.

Run: ``python examples/toy_replication/replication_world.py --output DIR`` writes general_prompts.jsonl and
domain_prompts.jsonl (no answers) and {valid,test}_{general,domain}.jsonl.
"""

import argparse
import random
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny_cpu"))

from world import TASKS as DEMO_TASKS  # noqa: E402
from world import Task, distinct, on_word, write_jsonl  # noqa: E402

GENERAL_KINDS = ("up", "rev", "dbl", "swap", "sort", "max", "add", "sub")
PROXY_STREAM = ("up", "rev", "add", "sub", "add")
PROXY_KINDS = tuple(dict.fromkeys(PROXY_STREAM))
DOMAIN_KINDS = ("tell", "~up", "~sort")
PLAIN_KINDS = ("plain-tell", "plain-~up", "plain-~sort")
"""Kinds with the domain's prompts and the general model's answers: only for its pre-training, never scored."""

TRAINING_PROMPTS = 4096
HELD_OUT_PER_KIND = 100  # for each of validation and test


def _sub(rng: random.Random) -> tuple[str, str]:
    """Draw a difference of two two-digit numbers that is not negative."""
    small, large = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    return f"{large}-{small}=", str(large - small)


def _sort_in(answer: str) -> Task:
    """Make a task of sorting five digits, which take the place of ``{}`` in ``answer``."""

    def draw(rng: random.Random) -> tuple[str, str]:
        digits = rng.choices("0123456789", k=5)
        return f"~sort {''.join(digits)}", answer.format("".join(sorted(digits)))

    return draw


TASKS: Mapping[str, Task] = DEMO_TASKS | {
    "swap": on_word("swap {}=", lambda word: word[1] + word[0] + word[3] + word[2]),
    "sub": _sub,
    "~up": on_word("~up {}", lambda word: f"{word.upper()} arr!"),
    "~sort": _sort_in("{} arr!"),
    "plain-~up": on_word("~up {}", str.upper),
    "plain-~sort": _sort_in("{}"),
}


def write_prompts(directory: Path) -> None:
    """Write the six prompt files; ``directory`` is made when missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for branch, stream, kinds in (
        ("general", PROXY_STREAM, GENERAL_KINDS),
        ("domain", DOMAIN_KINDS, DOMAIN_KINDS),
    ):
        rows = distinct(stream, TRAINING_PROMPTS, held_out=False, seed=f"replication {branch}", tasks=TASKS)
        write_jsonl(directory / f"{branch}_prompts.jsonl", rows, branch, with_answer=False)
        splits: dict[str, list] = {"valid": [], "test": []}
        for kind in kinds:
            held = distinct(
                [kind], 2 * HELD_OUT_PER_KIND, held_out=True, seed=f"replication held out {kind}", tasks=TASKS
            )
            splits["valid"] += held[:HELD_OUT_PER_KIND]
            splits["test"] += held[HELD_OUT_PER_KIND:]
        for split, examples in splits.items():
            write_jsonl(directory / f"{split}_{branch}.jsonl", examples, f"{split}-{branch}", with_answer=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the replication's prompt and evaluation files.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the six JSONL files")
    write_prompts(parser.parse_args().output)


if __name__ == "__main__":
    main()
