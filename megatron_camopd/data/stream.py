"""An endless, shuffled, resumable stream of encoded prompts: one per branch.

The choice made: the order is a pure function of (seed, name, epoch) and the only state is a cursor. The prompt drawn at
cursor c is ``rows[permutation(seed, name, c // n)[c % n]]`` with n the number of rows, so a resumed run continues with
the very next prompt, and every rank that builds the same stream draws the same global batch. No global random
generator is read or moved. The permutation sorts raw PCG64 words, which NumPy promises not to change between
versions (it does not promise that for ``Generator.permutation``).

Prompts are encoded when they are drawn and not kept: a step's prompts cost milliseconds, a million encoded prompts
would cost gigabytes.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_camopd.data.chat import ChatFormatter
from megatron_camopd.data.prompt_files import PromptSet
from megatron_camopd.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt ready for the rollout engine.

    Attributes:
        id: the row's id.
        category: the row's category, or None.
        token_ids: at least one token id, generation prompt included.
        position: the cursor at which it was drawn, ``epoch * rows + place in the epoch``; no two draws share one.
    """

    id: str
    category: str | None
    token_ids: list[int]
    position: int


class PromptStream:
    """Hands out prompts of one branch, epoch after epoch.

    Attributes:
        skipped: prompts passed over for their length since the run began; part of the state.
        truncated: prompts cut to the length limit since the run began; part of the state.
    """

    def __init__(self, prompts: PromptSet, formatter: ChatFormatter, *, seed: int, name: str) -> None:
        """Start at the first prompt of epoch 0.

        Args:
            prompts: what ``read_prompts`` returned.
            formatter: encodes a row or returns None to pass over it; must be a pure function of the row.
            seed: any whole number; decides the order together with ``name``.
            name: the stream's name, so that two streams of one seed walk in different orders.
        """
        assert prompts.prompts, "read_prompts never returns an empty set"
        self._prompts = prompts
        self._formatter = formatter
        self._seed = seed
        self._name = name
        self._cursor = 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, permutation) of the epoch being walked
        self._overlong_rows: set[int] = set()  # known in this process; saves encoding them once an epoch
        self.skipped = 0
        self.truncated = 0

    def __len__(self) -> int:
        """Rows in one epoch, too long ones included."""
        return len(self._prompts.prompts)

    def next(self, count: int) -> list[EncodedPrompt]:
        """Draw the next ``count`` prompts, across epoch borders if need be.

        Args:
            count: prompts to draw, at least 1; may exceed the number of rows.

        Returns:
            Exactly ``count`` prompts in stream order.

        Raises:
            ConfigurationError: a row cannot be encoded, or every row is longer than ``--max-prompt-length``.
        """
        assert count >= 1, count
        drawn: list[EncodedPrompt] = []
        while len(drawn) < count:
            position = self._cursor
            row = self._row_at(position)
            token_ids = None if row in self._overlong_rows else self._encode(row)
            self._cursor += 1
            if token_ids is None:
                self._pass_over(row)
                continue
            prompt = self._prompts.prompts[row]
            drawn.append(EncodedPrompt(prompt.id, prompt.category, token_ids, position))
        return drawn

    def seek(self, cursor: int) -> None:
        """Continue at draw number ``cursor`` (0 or more), counted from the start of epoch 0."""
        assert cursor >= 0, cursor
        self._cursor = cursor

    def state_dict(self) -> dict[str, int | str]:
        """The stream's place as plain JSON values: order (seed, name), place, and which files it belongs to."""
        epoch, position = divmod(self._cursor, len(self))
        return {
            "name": self._name,
            "seed": self._seed,
            "epoch": epoch,
            "position": position,
            "skipped": self.skipped,
            "truncated": self.truncated,
            "sha256": self._prompts.sha256,
            "count": len(self),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Args:
            state: a ``state_dict`` of a stream with the same files, seed and name.

        Raises:
            ConfigurationError: the state is incomplete or out of range, or belongs to other files, another seed or
                another stream; the stream is then unchanged.
        """
        flag = self._prompts.flag
        expected = self.state_dict()
        for key, value in expected.items():
            if type(state.get(key)) is not type(value):
                raise ConfigurationError(
                    f'{flag}: the prompt state in the checkpoint has no valid "{key}"; it is damaged'
                )
        if (state["sha256"], state["count"]) != (expected["sha256"], expected["count"]):
            raise ConfigurationError(
                f"{flag}: the files hold {len(self)} prompts (sha256 {self._prompts.sha256[:12]}), the checkpoint was "
                f"made with {state['count']} (sha256 {state['sha256'][:12]}); give the same files in the same order"
            )
        if state["name"] != self._name:
            raise ConfigurationError(f"{flag}: the prompt state is of stream {state['name']!r}, not {self._name!r}")
        if state["seed"] != self._seed:
            raise ConfigurationError(
                f"--seed {self._seed}: the checkpoint's prompt order has seed {state['seed']}; use that"
            )
        counts = min(state["epoch"], state["skipped"], state["truncated"])
        if not (counts >= 0 and 0 <= state["position"] < len(self)):
            raise ConfigurationError(
                f"{flag}: the checkpoint's place in the prompts (epoch {state['epoch']}, position {state['position']}, "
                f"skipped {state['skipped']}) is out of range for {len(self)} prompts; the checkpoint is damaged"
            )
        self._cursor = state["epoch"] * len(self) + state["position"]
        self.skipped = state["skipped"]
        self.truncated = state["truncated"]

    def _encode(self, row: int) -> list[int] | None:
        cut_before = self._formatter.truncated
        try:
            token_ids = self._formatter.encode(self._prompts.prompts[row])
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._prompts.flag}: {error}") from error
        self.truncated += self._formatter.truncated - cut_before
        return token_ids

    def _pass_over(self, row: int) -> None:
        self.skipped += 1
        self._overlong_rows.add(row)
        if len(self._overlong_rows) == len(self):
            raise ConfigurationError(
                f"{self._prompts.flag}: all {len(self)} prompts are longer than --max-prompt-length; "
                "raise it, or cut prompts instead of skipping them"
            )

    def _row_at(self, cursor: int) -> int:
        epoch, place = divmod(cursor, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _permutation(len(self), seed=self._seed, name=self._name, epoch=epoch))
        return int(self._order[1][place])


def _permutation(count: int, *, seed: int, name: str, epoch: int) -> np.ndarray:
    """Shuffle ``range(count)`` as a pure function of the arguments.

    Returns:
        int64 [count]: every row once.
    """
    # Hashing keeps the three inputs apart (no sums or concatenations that collide) and takes any whole number.
    digest = hashlib.sha256(json.dumps([seed, name, epoch]).encode()).digest()
    words = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "little"))).random_raw(count)
    return np.argsort(words, kind="stable")
