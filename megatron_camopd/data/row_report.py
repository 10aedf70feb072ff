"""Report on the rows of some files, in numbers and in words."""

from collections import Counter
from dataclasses import dataclass, field

from megatron_camopd.data.row_files import one_line

_SHOWN_FIELDS = 8


@dataclass(frozen=True, slots=True)
class RowReport:
    """Report on the rows of some files.

    Attributes:
        rows: number of rows.
        longest: tokens of the longest row, or sequence of a conversation that is split, before it is cut.
        overlong: number of rows that are longer than the limit.
        unusable: number of rows that are left out: too long and skipped, or nothing to train is left of them.
        split: number of conversations that become several sequences.
        unread: number of messages with each standard field that the chat template does not read.
        turns_dropped: number of assistant turns of the other conversations of which the cut leaves nothing.
        special: number of prompts that hold special tokens, which are encoded as such.
        unread_fields: number of rows with each field that is not read; known from the reading of the files.
    """

    rows: int = 0
    longest: int = 0
    overlong: int = 0
    unusable: int = 0
    split: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    turns_dropped: int = 0
    special: int = 0
    unread_fields: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "RowReport") -> "RowReport":
        return RowReport(
            self.rows + other.rows,
            max(self.longest, other.longest),
            self.overlong + other.overlong,
            self.unusable + other.unusable,
            self.split + other.split,
            dict(Counter(self.unread) + Counter(other.unread)),
            self.turns_dropped + other.turns_dropped,
            self.special + other.special,
            dict(Counter(self.unread_fields) + Counter(other.unread_fields)),
        )

    def line(self, limit: str, policy: str) -> str:
        """Return the counts as words of a line.

        Args:
            limit: the flag that sets the length limit.
            policy: what happens to longer rows: ``skip``, ``truncate-left`` or ``truncate-right``.
        """
        handling = "left out" if policy == "skip" else f"cut on the {policy.removeprefix('truncate-')}"
        words = [f"{self.rows:,} rows", f"longest {self.longest:,} tokens"]
        if self.overlong:
            words.append(f"{self.overlong:,} longer than {limit} ({handling})")
        if self.unusable and policy != "skip":
            words.append(f"{self.unusable:,} with nothing left to train (left out)")
        if self.turns_dropped:
            words.append(f"{self.turns_dropped:,} assistant turns of the rest cut off whole")
        if self.split:
            words.append(f"{self.split:,} split into their turns")
        return ", ".join(words)

    def notes(self) -> list[str]:
        """Return a line for everything in the rows that is not as it may seem."""
        lines = [
            f"{count:,} messages have a `{name}`, which the chat template does not read"
            for name, count in sorted(self.unread.items())
        ]
        if self.special:
            lines.append(f"{self.special:,} rows hold special tokens, which are encoded as such")
        if self.unread_fields:
            most = sorted(self.unread_fields.items(), key=lambda item: (-item[1], item[0]))
            words = [f"{_shown_name(name)} ({count:,} rows)" for name, count in most[:_SHOWN_FIELDS]]
            more = f" and {len(most) - _SHOWN_FIELDS:,} more" if len(most) > _SHOWN_FIELDS else ""
            lines.append(f"not read: {', '.join(words)}{more}")
        return lines


def _shown_name(name: str) -> str:
    return one_line(name if name.isprintable() and name else ascii(name), limit=40)
