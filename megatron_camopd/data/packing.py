"""Conversations packed into rows of a fixed length: as an endless shuffled stream of batches, or whole files in order.

A packed row is one training sequence that holds one or more whole conversations.

Design choice: a batch has a fixed number of packed rows. Conversations are drawn in shuffled order, and each goes into
the first packed row with enough room; the first one that fits nowhere begins the next batch. Packed rows end up nearly
full, and the position in the shuffled order is the only state. The sequences of a conversation that
``ConversationFormatter`` has split may lie in different rows, but never in different batches. Every rank packs the
whole global batch, so all ranks know its number of trained tokens without communication. A thread encodes the next
batch while the current one trains.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_camopd.data.conversation_tokens import ConversationFormatter, EncodedConversation
from megatron_camopd.data.conversations import Conversation, ConversationSet
from megatron_camopd.data.shuffled_rows import ShuffledRows
from megatron_camopd.errors import ConfigurationError

PackedRow = list[EncodedConversation]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Global batch of packed rows.

    Attributes:
        rows: sequences of each packed row, together at most the row length. A row may be empty if the next
            conversation is split into more sequences than there is room for.
    """

    rows: list[PackedRow]

    @property
    def conversations(self) -> int:
        """Number of conversations."""
        return sum(sequence.part == 0 for row in self.rows for sequence in row)

    @property
    def tokens(self) -> int:
        """Number of tokens of all conversations."""
        return sum(len(conversation) for row in self.rows for conversation in row)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens whose prediction enters the loss; the first one of a conversation is never predicted."""
        return sum(sum(conversation.trained[1:]) for row in self.rows for conversation in row)


@dataclass(frozen=True, slots=True)
class PackedSet:
    """All conversations of some files, packed.

    Attributes:
        batch: the packed rows.
        skipped: number of conversations that were left out.
        truncated: number of conversations that were cut at the length limit.
        split: number of conversations that became several sequences.
        turns_dropped: number of assistant turns of the other conversations of which the cut left nothing.
    """

    batch: PackedBatch
    skipped: int
    truncated: int
    split: int = 0
    turns_dropped: int = 0

    def summary(self, name: str) -> str:
        """Return the counts as one line for the log."""
        batch = self.batch
        split = f", {self.split} split into their turns" if self.split else ""
        dropped = f", {self.turns_dropped} turns cut off" if self.turns_dropped else ""
        return (
            f"{name}: {batch.conversations} conversations, {batch.trained_tokens} assistant tokens in "
            f"{len(batch.rows)} rows; {self.skipped} skipped, {self.truncated} truncated at --seq-length"
            f"{split}{dropped}"
        )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Batch and the state of the stream after it."""

    batch: PackedBatch
    cursor: int
    skipped: int
    truncated: int
    split: int
    turns_dropped: int


class ConversationStream(ShuffledRows):
    """Endless stream of packed batches.

    ``skipped`` counts the conversations that are too long or have no token to train after truncation.

    Attributes:
        split: number of conversations that became several sequences since the run began; part of the state.
        turns_dropped: number of assistant turns of which the cut left nothing, since the run began, without those of
            skipped conversations; part of the state.
    """

    def __init__(
        self, conversations: ConversationSet, formatter: ConversationFormatter, *, row_length: int, seed: int, name: str
    ) -> None:
        """Start at the first conversation of epoch 0.

        Args:
            conversations: the conversations to draw from.
            formatter: encodes a conversation.
            row_length: tokens of a packed row, at least the formatter's ``max_length``.
            seed: see :class:`ShuffledRows`.
            name: see :class:`ShuffledRows`.
        """
        super().__init__(
            len(conversations), sha256=conversations.sha256, flag=conversations.flag, what="conversations", seed=seed,
            name=name,
        )  # fmt: skip
        self._conversations, self._formatter, self._row_length = conversations, formatter, row_length
        self.split = self.turns_dropped = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")
        self._ahead: tuple[tuple[int, int], Future[_Drawn]] | None = None  # (cursor, rows) and their batch

    def state_dict(self) -> dict[str, int | str]:
        """Return the state of :class:`ShuffledRows`, the number of split conversations and of dropped turns."""
        return super().state_dict() | {"split": self.split, "turns_dropped": self.turns_dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position at which ``state`` was taken; counts that an earlier version lacks begin at 0.

        Raises:
            ConfigurationError: see :meth:`ShuffledRows.load_state_dict`.
        """
        state = {"split": 0, "turns_dropped": 0} | state
        super().load_state_dict(state)
        self.split, self.turns_dropped = state["split"], state["turns_dropped"]

    def next_batch(self, rows: int) -> PackedBatch:
        """Return the next batch of ``rows`` packed rows.

        Raises:
            ConfigurationError: a conversation cannot be encoded or does not fit a batch, or none fits a packed row.
        """
        assert rows >= 1, rows
        if self._ahead is not None and self._ahead[0] == (self._cursor, rows):
            drawn = self._ahead[1].result()
        else:
            counts = self.skipped, self.truncated, self.split, self.turns_dropped
            drawn = self._draw(_Drawn(PackedBatch([]), self._cursor, *counts), rows)
        self._cursor, self.skipped, self.truncated = drawn.cursor, drawn.skipped, drawn.truncated
        self.split, self.turns_dropped = drawn.split, drawn.turns_dropped
        self._ahead = (self._cursor, rows), self._thread.submit(self._draw, drawn, rows)
        return drawn.batch

    def _draw(self, last: _Drawn, rows: int) -> _Drawn:
        """Pack the batch after ``last``, without changing the state of the stream."""
        packed: list[PackedRow] = [[] for _ in range(rows)]
        free = [self._row_length] * rows
        cursor, skipped, truncated = last.cursor, last.skipped, last.truncated
        split, dropped = last.split, last.turns_dropped
        skipped_in_succession = 0
        while True:
            conversation = self._conversations[self._row_at(cursor)]
            sequences = encoded(self._formatter, conversation, self._flag)
            if not sequences:
                cursor, skipped, skipped_in_succession = cursor + 1, skipped + 1, skipped_in_succession + 1
                if skipped_in_succession == len(self):
                    raise ConfigurationError(none_fits(self._flag, len(self), self._formatter))
                continue
            places = first_fit([len(sequence) for sequence in sequences], free)
            if places is None:
                if not any(packed):
                    raise ConfigurationError(too_many_sequences(self._flag, conversation, len(sequences), rows))
                return _Drawn(PackedBatch(packed), cursor, skipped, truncated, split, dropped)
            for place, sequence in zip(places, sequences, strict=True):
                packed[place].append(sequence)
                free[place] -= len(sequence)
            cursor, skipped_in_succession = cursor + 1, 0
            truncated, split = truncated + self._formatter.truncated, split + (len(sequences) > 1)
            dropped += self._formatter.turns_dropped


def pack_in_order(conversations: ConversationSet, formatter: ConversationFormatter, *, row_length: int) -> PackedSet:
    """Pack all conversations in file order; a sequence that does not fit the current packed row begins the next.

    Raises:
        ConfigurationError: a conversation cannot be encoded, or all are skipped.
    """
    rows: list[PackedRow] = []
    free = skipped = truncated = split = dropped = 0
    for index in range(len(conversations)):
        sequences = encoded(formatter, conversations[index], conversations.flag)
        if not sequences:
            skipped += 1
            continue
        for sequence in sequences:
            if len(sequence) > free:
                rows.append([])
                free = row_length
            rows[-1].append(sequence)
            free -= len(sequence)
        truncated, split = truncated + formatter.truncated, split + (len(sequences) > 1)
        dropped += formatter.turns_dropped
    if not rows:
        raise ConfigurationError(none_fits(conversations.flag, len(conversations), formatter))
    return PackedSet(PackedBatch(rows), skipped, truncated, split, dropped)


def encoded(formatter: ConversationFormatter, conversation: Conversation, flag: str) -> list[EncodedConversation]:
    """Encode a conversation of the files that ``flag`` names.

    Raises:
        ConfigurationError: see :meth:`ConversationFormatter.encode`; the text names the flag too.
    """
    try:
        return formatter.encode(conversation)
    except ConfigurationError as error:
        raise ConfigurationError(f"{flag}: {error}") from error


def first_fit(lengths: Sequence[int], free: Sequence[int]) -> list[int] | None:
    """Return for each sequence the first packed row with room, or None if they do not all fit.

    Args:
        lengths: tokens of each sequence.
        free: free tokens of each packed row; not changed.
    """
    left, places = list(free), []
    for length in lengths:
        place = next((row for row, room in enumerate(left) if room >= length), None)
        if place is None:
            return None
        left[place] -= length
        places.append(place)
    return places


def none_fits(flag: str, count: int, formatter: ConversationFormatter) -> str:
    """Return the error text for files of which no conversation can be trained."""
    if formatter.overlong == "skip":
        return (
            f"{flag}: not one of the {count} conversations fits --seq-length {formatter.max_length}; raise it, or let "
            "--overlong-conversations truncate-right cut them"
        )
    return (
        f"{flag}: not one of the {count} conversations has anything to train within --seq-length "
        f"{formatter.max_length}; raise it"
    )


def too_many_sequences(flag: str, conversation: Conversation, count: int, rows: int) -> str:
    """Return the error text for a conversation that is split into more sequences than a batch holds."""
    return (
        f"{flag}: {conversation.where}: the chat template renders earlier turns differently, so the conversation is "
        f"split into {count} sequences, which do not fit a batch of {rows} rows; raise --global-batch-size or "
        "--seq-length, or split the row"
    )
