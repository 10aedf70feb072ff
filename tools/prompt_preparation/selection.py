"""Sampling without replacement in one pass: the k rows with the smallest hashes.

A row's priority is SHA-256(seed, name of the draw, its text). So the k smallest are a uniform sample of the distinct
texts, which does not depend on the order or the number of files. It needs memory for k rows, and drops duplicates,
since equal texts have equal priorities.
"""

import hashlib
import heapq
import json
import re
from typing import Any

_NOT_A_WORD = re.compile(r"[\W_]+")


def priority(seed: int, name: str, *text: str) -> int:
    """Return the pseudo-random priority of ``text`` in the draw ``name``, 256 bits."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, name, *text]).encode()).digest(), "big")


def normalized(text: str) -> str:
    """Reduce ``text`` to lower-case letters and digits with single spaces, to recognise other spellings of it."""
    return _NOT_A_WORD.sub(" ", text.lower()).strip()


class Sample:
    """The ``size`` items of the smallest priorities.

    Attributes:
        duplicates: Number of offers whose text was among the kept items at that time. Duplicates of a text that was
            dropped before are not recognised, so this counts only a part of a source's duplicates.
    """

    def __init__(self, size: int) -> None:
        self.size, self.duplicates = size, 0
        self._items: dict[int, tuple[str, Any]] = {}
        self._largest_first: list[int] = []

    def offer(self, rank: int, identity: str, item: Any) -> None:
        """Consider ``item``; of equal texts the one with the smallest ``identity`` is kept, in any order of offers."""
        if rank in self._items:
            self.duplicates += 1
            if identity < self._items[rank][0]:
                self._items[rank] = identity, item
        elif len(self._items) < self.size:
            self._items[rank] = identity, item
            heapq.heappush(self._largest_first, -rank)
        elif self.size and rank < -self._largest_first[0]:
            del self._items[-heapq.heapreplace(self._largest_first, -rank)]
            self._items[rank] = identity, item

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> list[Any]:
        """Return the items, smallest priority first."""
        return [item for _, (_, item) in sorted(self._items.items())]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"duplicates": self.duplicates, "items": [[hex(rank), *kept] for rank, kept in self._items.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        self.duplicates = state["duplicates"]
        self._items = {int(rank, 16): (identity, item) for rank, identity, item in state["items"]}
        self._largest_first = [-rank for rank in self._items]
        heapq.heapify(self._largest_first)
