"""Conversations packed into rows of a fixed length: as an endless shuffled stream of batches, or whole files in order.

A packed row is one training sequence that holds one or more whole conversations.

Design choice: a batch has a fixed number of packed rows. Conversations are drawn in shuffled order, and each goes into
the first packed row with enough room; the first one that fits nowhere begins the next batch. Packed rows end up nearly
full, no conversation is split, and the position in the shuffled order is the only state. Every rank packs the whole
global batch, so all ranks know its number of trained tokens without communication. A thread encodes the next batch
while the current one trains.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from megatron_camopd.data.conversation_tokens import ConversationFormatter, EncodedConversation
from megatron_camopd.data.conversations import ConversationSet
from megatron_camopd.data.shuffled_rows import ShuffledRows
from megatron_camopd.errors import ConfigurationError

PackedRow = list[EncodedConversation]
_NONE_FITS = (
    "{flag}: not one of the {count} conversations fits --seq-length; raise it, or let --overlong-conversations "
    "truncate-right cut them"
)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Global batch of packed rows.

    Attributes:
        rows: conversations of each packed row: at least one, together at most the row length.
    """

    rows: list[PackedRow]

    @property
    def conversations(self) -> int:
        """Number of conversations."""
        return sum(map(len, self.rows))

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
    """

    batch: PackedBatch
    skipped: int
    truncated: int

    def summary(self, name: str) -> str:
        """Return the counts as one line for the log."""
        batch = self.batch
        return (
            f"{name}: {batch.conversations} conversations, {batch.trained_tokens} assistant tokens in "
            f"{len(batch.rows)} rows; {self.skipped} skipped, {self.truncated} truncated at --seq-length"
        )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Batch and the state of the stream after it."""

    batch: PackedBatch
    cursor: int
    skipped: int
    truncated: int


class ConversationStream(ShuffledRows):
    """Endless stream of packed batches.

    ``skipped`` counts the conversations that are too long or have no token to train after truncation.
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")
        self._ahead: tuple[tuple[int, int], Future[_Drawn]] | None = None  # (cursor, rows) and their batch

    def next_batch(self, rows: int) -> PackedBatch:
        """Return the next batch of ``rows`` packed rows.

        Raises:
            ConfigurationError: a conversation cannot be encoded, or none fits a packed row.
        """
        assert rows >= 1, rows
        if self._ahead is not None and self._ahead[0] == (self._cursor, rows):
            drawn = self._ahead[1].result()
        else:
            drawn = self._draw(self._cursor, rows, self.skipped, self.truncated)
        self._cursor, self.skipped, self.truncated = drawn.cursor, drawn.skipped, drawn.truncated
        future = self._thread.submit(self._draw, self._cursor, rows, self.skipped, self.truncated)
        self._ahead = (self._cursor, rows), future
        return drawn.batch

    def _draw(self, cursor: int, rows: int, skipped: int, truncated: int) -> _Drawn:
        """Pack the batch that begins at ``cursor``, without changing the state of the stream."""
        packed: list[PackedRow] = [[] for _ in range(rows)]
        free = [self._row_length] * rows
        skipped_in_succession = 0
        while True:
            conversation = self._formatter.encode(self._conversations[self._row_at(cursor)])
            if conversation is None:
                cursor, skipped, skipped_in_succession = cursor + 1, skipped + 1, skipped_in_succession + 1
                if skipped_in_succession == len(self):
                    raise ConfigurationError(_NONE_FITS.format(flag=self._flag, count=len(self)))
                continue
            fitting = next((row for row in range(rows) if free[row] >= len(conversation)), None)
            if fitting is None:
                return _Drawn(PackedBatch(packed), cursor, skipped, truncated)
            packed[fitting].append(conversation)
            free[fitting] -= len(conversation)
            cursor, truncated, skipped_in_succession = cursor + 1, truncated + self._formatter.truncated, 0


def pack_in_order(conversations: ConversationSet, formatter: ConversationFormatter, *, row_length: int) -> PackedSet:
    """Pack all conversations in file order; one that does not fit the current packed row begins the next.

    Raises:
        ConfigurationError: a conversation cannot be encoded, or all are skipped.
    """
    rows: list[PackedRow] = []
    free = skipped = truncated = 0
    for index in range(len(conversations)):
        conversation = formatter.encode(conversations[index])
        if conversation is None:
            skipped += 1
            continue
        if len(conversation) > free:
            rows.append([])
            free = row_length
        rows[-1].append(conversation)
        free -= len(conversation)
        truncated += formatter.truncated
    if not rows:
        raise ConfigurationError(_NONE_FITS.format(flag=conversations.flag, count=len(conversations)))
    return PackedSet(PackedBatch(rows), skipped, truncated)
