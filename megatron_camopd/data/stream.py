"""Endless, shuffled, resumable stream of encoded prompts, one for each branch.

Order and state are those of ``shuffled_rows.ShuffledRows``. Prompts are encoded when they are drawn and not kept:
encoding the prompts of a step takes milliseconds, while a million encoded prompts would take gigabytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_camopd.data.chat import ChatFormatter
from megatron_camopd.data.prompt_files import PromptSet
from megatron_camopd.data.shuffled_rows import ShuffledRows
from megatron_camopd.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Prompt for the rollout engine.

    Attributes:
        id: the row's id.
        category: the row's category, or None.
        token_ids: at least one token id, generation prompt included.
        position: the cursor at which it was drawn; no two draws of a stream share one.
    """

    id: str
    category: str | None
    token_ids: list[int]
    position: int


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """The prompts of a global batch, which every rank draws alike.

    prompts   N prompts
    branches  branch of each: its place in the run's table of branches
    indices   place of each in the global batch, rising; with the step it decides the random numbers
    """

    prompts: list[EncodedPrompt]
    branches: list[int]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def draw(streams: Mapping[int, "PromptStream"], counts: Sequence[int], *, first_index: int = 0) -> "PromptBatch":
        """Draw ``counts[b]`` prompts from the stream of each branch b, the branches one after the other."""
        prompts = [prompt for branch, count in enumerate(counts) if count for prompt in streams[branch].next(count)]
        return PromptBatch(
            prompts,
            branches=[branch for branch, count in enumerate(counts) for _ in range(count)],
            indices=[first_index + place for place in range(len(prompts))],
        )


class PromptStream(ShuffledRows):
    """Endless stream of the prompts of one branch; ``skipped`` counts those that are too long."""

    def __init__(self, prompts: PromptSet, formatter: ChatFormatter, *, seed: int, name: str) -> None:
        """Start at the first prompt of epoch 0.

        Args:
            prompts: result of ``read_prompts``.
            formatter: encodes a row or returns None to skip it; must be a pure function of the row.
            seed: see :class:`ShuffledRows`.
            name: see :class:`ShuffledRows`.
        """
        assert prompts.prompts, "read_prompts never returns an empty set"
        super().__init__(
            len(prompts.prompts), sha256=prompts.sha256, flag=prompts.flag, what="prompts", seed=seed, name=name
        )
        self._prompts = prompts
        self._formatter = formatter
        self._overlong_rows: set[int] = set()  # found so far in this process; they need not be encoded again

    def next(self, count: int) -> list[EncodedPrompt]:
        """Draw the next ``count`` prompts, across epochs if necessary.

        Args:
            count: number of prompts to draw, at least 1; may exceed the number of rows.

        Returns:
            Exactly ``count`` prompts, in the order of the stream.

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
                self._skip(row)
                continue
            prompt = self._prompts.prompts[row]
            drawn.append(EncodedPrompt(prompt.id, prompt.category, token_ids, position))
        return drawn

    def _encode(self, row: int) -> list[int] | None:
        cut_before = self._formatter.truncated
        try:
            token_ids = self._formatter.encode(self._prompts.prompts[row])
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._prompts.flag}: {error}") from error
        self.truncated += self._formatter.truncated - cut_before
        return token_ids

    def _skip(self, row: int) -> None:
        self.skipped += 1
        self._overlong_rows.add(row)
        if len(self._overlong_rows) == len(self):
            raise ConfigurationError(all_too_long(self._prompts.flag, len(self)))


def all_too_long(flag: str, count: int) -> str:
    """Return the error text for files of which every prompt is too long and skipped."""
    return (
        f"{flag}: all {count} prompts are longer than --max-prompt-length; raise it, or cut prompts instead of "
        "skipping them"
    )
