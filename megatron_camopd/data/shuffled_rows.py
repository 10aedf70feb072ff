"""Endless, resumable order of rows, shuffled anew in every epoch.

Design choice: the order is a pure function of (seed, name, epoch), and the only state is a cursor. The row drawn at
cursor c is ``permutation(seed, name, c // n)[c % n]``, where n is the number of rows. A resumed run thus continues with
the next row, and all ranks draw the same global batch. No global random generator is read or advanced. The permutation
sorts the raw output of PCG64, which NumPy guarantees to be the same in all versions (it gives no such guarantee for
``Generator.permutation``).
"""

import hashlib
import json
from typing import Any

import numpy as np

from megatron_camopd.errors import ConfigurationError


class ShuffledRows:
    """Position in an endless shuffled order of rows, with state for checkpoints.

    Attributes:
        skipped: number of rows skipped since the run began; part of the state.
        truncated: number of rows cut to the length limit since the run began; part of the state.
    """

    def __init__(self, count: int, *, sha256: str, flag: str, what: str, seed: int, name: str) -> None:
        """Start at the first row of epoch 0.

        Args:
            count: number of rows, at least 1.
            sha256: digest of the files that hold them.
            flag: the flag that named these files, for error texts.
            what: plural noun for the rows, for error texts: "prompts".
            seed: any whole number; determines the order together with ``name``.
            name: name of the stream; streams with the same seed and different names have different orders.
        """
        assert count >= 1, count
        self._count, self._sha256, self._flag, self._what = count, sha256, flag, what
        self._seed = seed
        self._name = name
        self._cursor = 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, permutation) of the current epoch
        self.skipped = 0
        self.truncated = 0

    def __len__(self) -> int:
        """Return the number of rows in one epoch."""
        return self._count

    @property
    def epochs(self) -> float:
        """Number of epochs drawn so far, with its fraction."""
        return self._cursor / len(self)

    def seek(self, cursor: int) -> None:
        """Continue at draw ``cursor``, counted from 0 at the start of epoch 0."""
        assert cursor >= 0, cursor
        self._cursor = cursor

    def state_dict(self) -> dict[str, int | str]:
        """Return the state as plain JSON values: the order (seed, name), the position in it, and the files' digest."""
        epoch, position = divmod(self._cursor, len(self))
        return {
            "name": self._name,
            "seed": self._seed,
            "epoch": epoch,
            "position": position,
            "skipped": self.skipped,
            "truncated": self.truncated,
            "sha256": self._sha256,
            "count": len(self),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position at which ``state`` was taken.

        Args:
            state: the ``state_dict`` of a stream with the same files, seed and name.

        Raises:
            ConfigurationError: the state is incomplete or out of range, or belongs to other files, another seed or
                another stream. This stream is then unchanged.
        """
        flag = self._flag
        expected = self.state_dict()
        for key, value in expected.items():
            if type(state.get(key)) is not type(value):
                raise ConfigurationError(
                    f'{flag}: the {self._what} state in the checkpoint has no valid "{key}"; it is damaged'
                )
        if (state["sha256"], state["count"]) != (expected["sha256"], expected["count"]):
            raise ConfigurationError(
                f"{flag}: the files hold {len(self)} {self._what} (sha256 {self._sha256[:12]}), the checkpoint was "
                f"made with {state['count']} (sha256 {state['sha256'][:12]}); give the same files in the same order"
            )
        if state["name"] != self._name:
            raise ConfigurationError(
                f"{flag}: the {self._what} state is of stream {state['name']!r}, not {self._name!r}"
            )
        if state["seed"] != self._seed:
            raise ConfigurationError(
                f"--seed {self._seed}: the checkpoint's {self._what} were in the order of seed {state['seed']}; "
                "use that"
            )
        counts = min(
            state[key] for key in ("epoch", "skipped", "truncated", "split", "turns_dropped") if key in expected
        )
        if not (counts >= 0 and 0 <= state["position"] < len(self)):
            raise ConfigurationError(
                f"{flag}: the checkpoint's place in the {self._what} (epoch {state['epoch']}, position "
                f"{state['position']}, skipped {state['skipped']}) is out of range for {len(self)} {self._what}; "
                "the checkpoint is damaged"
            )
        self._cursor = state["epoch"] * len(self) + state["position"]
        self.skipped = state["skipped"]
        self.truncated = state["truncated"]

    def _row_at(self, cursor: int) -> int:
        epoch, position = divmod(cursor, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _permutation(len(self), seed=self._seed, name=self._name, epoch=epoch))
        return int(self._order[1][position])


def _permutation(count: int, *, seed: int, name: str, epoch: int) -> np.ndarray:
    """Shuffle ``range(count)`` as a pure function of the arguments.

    Returns:
        int64 [count]: every row once.
    """
    # A hash takes any whole number as seed, and unlike a sum it does not map different inputs to the same generator.
    digest = hashlib.sha256(json.dumps([seed, name, epoch]).encode()).digest()
    words = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "little"))).random_raw(count)
    result: np.ndarray = np.argsort(words, kind="stable")
    return result
