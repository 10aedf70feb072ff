"""Branches as the records of a run name them: which there are, in which order, and the colour of each.

A branch is known by the records' ``branch``, by ``gap_abs_mean_NAME`` of a step that mixes branches, or by
``NAME_grad_norm`` where gradients of branches were measured. ``mixed`` is no branch, but what a step of several is
called. General and domain come first and have colours of their own; other branches follow by the alphabet, so that a
branch looks the same in every run with the same branches.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

MIXED = "mixed"
FIRST = ("general", "domain")  # in this order, and in the first two colours
GAP, GAP_MEAN = "gap_abs_mean_", "gap_mean_"  # keys of a mixed step, before a branch's name
NORM = "_grad_norm"  # a key of a step whose gradients were measured, after a branch's name
COLOURS = 7
# Places in the palette for branches other than FIRST, and for mixed steps: those that differ most from the first two
# come first, and the colours of FIRST last.
_FREE_COLOURS = (2, 3, 5, 6, 4, 1, 0)


def branch_names(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the branches that ``records`` name, in order; ``mixed`` is not among them."""
    found: set[str] = set()
    for record in records:
        found.add(record["branch"])
        if record["branch"] == MIXED:
            found |= {key.removeprefix(GAP) for key in record if key.startswith(GAP)}
        if any(key.startswith(("branch_cosine", "branch_dot_product")) for key in record):
            found |= {key.removesuffix(NORM) for key in record if key.endswith(NORM)}
    return tuple(in_order(found - {MIXED}))


def in_order(names: Iterable[str]) -> list[str]:
    """Return each of ``names`` once: general, domain, others by the alphabet, mixed last."""
    there = set(names)
    last = [MIXED] if MIXED in there else []
    return [name for name in FIRST if name in there] + sorted(there - {*FIRST, MIXED}) + last


def pairs(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return every pair of branches, by what a figure calls it: ``{"general, math": ("general", "math"), ...}``."""
    return {f"{first}, {second}": (first, second) for first, second in combinations(names, 2)}


def pair_keys(metric: str, pair: tuple[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys under which records hold ``metric`` of a pair: named by it, or bare where there is one pair."""
    first, second = pair
    bare = (metric,) if len(names) == 2 else ()
    return (f"{metric}_{first}:{second}", f"{metric}_{second}:{first}", *bare)


def colour_and_line(name: str, names: Sequence[str]) -> tuple[int, int]:
    """Return the place in the palette of branch ``name`` among ``names``, and the kind of line.

    The kind is 0 as long as there are colours left, and rises where branches outnumber them.
    """
    others = [each for each in [*in_order(names), MIXED] if each not in FIRST]
    if name in FIRST:
        return FIRST.index(name), 0
    taken = [FIRST.index(each) for each in FIRST if each in names]
    free = [place for place in _FREE_COLOURS if place not in taken]
    # With every free colour used, the next branches go through all of them again with another kind of line.
    rank = others.index(name)
    if rank < len(free):
        return free[rank], 0
    line, place = divmod(rank - len(free), COLOURS)
    return _FREE_COLOURS[place], line + 1
