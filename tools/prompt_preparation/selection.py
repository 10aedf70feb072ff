"""Sampling without replacement in one pass: the k rows with the smallest hash.

A row's priority is SHA-256(seed, name of the draw, its text): a uniform sample of the distinct texts, which does not
depend on the order or the number of files, needs memory for k rows, and drops duplicates by itself, since equal texts
have equal priorities.
"""

import hashlib
import heapq
import json
import re
from typing import Any

_NOT_A_WORD = re.compile(r"[\W_]+")


def priority(seed: int, name: str, *text: str) -> int:
    """256 bits of chance for ``text`` in the draw ``name``."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, name, *text]).encode()).digest(), "big")


def normalized(text: str) -> str:
    """Lower-case letters and digits with single spaces: what two writings of one text have in common."""
    return _NOT_A_WORD.sub(" ", text.lower()).strip()


class Sample:
    """The ``size`` items of the smallest priorities.

    Attributes:
        duplicates: offers whose text was among the items kept at that time. Of a text that was already out of the
            running nobody remembers, so this counts part of the duplicates of a source.
    """

    def __init__(self, size: int) -> None:
        self.size, self.duplicates = size, 0
        self._items: dict[int, tuple[str, Any]] = {}
        self._largest_first: list[int] = []

    def offer(self, rank: int, identity: str, item: Any) -> None:
        """Consider ``item``; of equal texts the one with the smallest ``identity`` stays, whatever came first."""
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
        """The items, smallest priority first."""
        return [item for _, (_, item) in sorted(self._items.items())]

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"duplicates": self.duplicates, "items": [[hex(rank), *kept] for rank, kept in self._items.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.duplicates = state["duplicates"]
        self._items = {int(rank, 16): (identity, item) for rank, identity, item in state["items"]}
        self._largest_first = [-rank for rank in self._items]
        heapq.heapify(self._largest_first)
