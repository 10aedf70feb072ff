"""Conversations packed into rows of equal length: a shuffled, endless stream of batches, and a file in order.

The choice made: a batch has a fixed number of rows; conversations are drawn in shuffled order, each goes into the first
row with room for it, and the first that fits nowhere begins the next batch. Rows end up nearly full, no conversation is
split, and the place in the shuffled order is all the state there is. Every rank packs the whole batch, so all know how
many tokens it trains without asking each other. The next batch is encoded in a thread while the current one trains.
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
    """``rows``: the conversations of each row, at least one, together at most a row's length."""

    rows: list[PackedRow]

    @property
    def conversations(self) -> int:
        return sum(map(len, self.rows))

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return sum(len(conversation) for row in self.rows for conversation in row)

    @property
    def trained_tokens(self) -> int:
        """Tokens whose prediction enters the loss; a conversation's first one is predicted by nothing."""
        return sum(sum(conversation.trained[1:]) for row in self.rows for conversation in row)


@dataclass(frozen=True, slots=True)
class PackedSet:
    """Whole files packed; ``skipped`` conversations are not in it, ``truncated`` ones lack their end."""

    batch: PackedBatch
    skipped: int
    truncated: int

    def summary(self, name: str) -> str:
        """What is in it, and what is not, in one line."""
        batch = self.batch
        return (
            f"{name}: {batch.conversations} conversations, {batch.trained_tokens} assistant tokens in "
            f"{len(batch.rows)} rows; {self.skipped} skipped, {self.truncated} truncated at --seq-length"
        )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A batch and the stream's place behind it."""

    batch: PackedBatch
    cursor: int
    skipped: int
    truncated: int


class ConversationStream(ShuffledRows):
    """Hands out packed batches, epoch after epoch; ``skipped`` counts conversations too long or without an answer."""

    def __init__(
        self, conversations: ConversationSet, formatter: ConversationFormatter, *, row_length: int, seed: int, name: str
    ) -> None:
        """``row_length``: tokens of a row, at least the formatter's ``max_length``. For the rest see ShuffledRows."""
        super().__init__(
            len(conversations), sha256=conversations.sha256, flag=conversations.flag, what="conversations", seed=seed,
            name=name,
        )  # fmt: skip
        self._conversations, self._formatter, self._row_length = conversations, formatter, row_length
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")
        self._ahead: tuple[tuple[int, int], Future[_Drawn]] | None = None  # (cursor, rows) and what comes of them

    def next_batch(self, rows: int) -> PackedBatch:
        """The next batch of ``rows`` rows. Errors: ConfigurationError where a conversation cannot be encoded."""
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
        """The batch that begins at ``cursor``; changes nothing of the stream's state."""
        packed: list[PackedRow] = [[] for _ in range(rows)]
        free = [self._row_length] * rows
        in_vain = 0
        while True:
            conversation = self._formatter.encode(self._conversations[self._row_at(cursor)])
            if conversation is None:
                cursor, skipped, in_vain = cursor + 1, skipped + 1, in_vain + 1
                if in_vain == len(self):
                    raise ConfigurationError(_NONE_FITS.format(flag=self._flag, count=len(self)))
                continue
            place = next((row for row in range(rows) if free[row] >= len(conversation)), None)
            if place is None:
                return _Drawn(PackedBatch(packed), cursor, skipped, truncated)
            packed[place].append(conversation)
            free[place] -= len(conversation)
            cursor, truncated, in_vain = cursor + 1, truncated + self._formatter.truncated, 0


def pack_in_order(conversations: ConversationSet, formatter: ConversationFormatter, *, row_length: int) -> PackedSet:
    """All conversations that can be encoded, in file order, each in the current row or else a new one.

    Errors: ConfigurationError where one cannot be encoded, or not one is left.
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
