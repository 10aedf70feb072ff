"""Packed batches: every conversation once an epoch, full rows, the same stream from any state."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.data import (
    ConversationFormatter,
    ConversationSet,
    ConversationStream,
    PackedBatch,
    pack_in_order,
)
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import make_tokenizer

ROW = 90


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> ConversationSet:
    path = tmp_path_factory.mktemp("packing") / "a.jsonl"
    rows = [{"id": f"c{row}", "messages": [{"role": "user", "content": "q" * (row % 13)  + "?"},
                                           {"role": "assistant", "content": "a" * (1 + 5 * row % 23)}]}
            for row in range(37)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ConversationSet([path], flag="--conversations")


def formatter(max_length: int = ROW, overlong: str = "truncate-right") -> ConversationFormatter:
    return ConversationFormatter(
        make_tokenizer(), template_kwargs={}, end_of_sequence_ids=[2], max_length=max_length, overlong=overlong
    )


def stream(
    conversations: ConversationSet, *, seed: int = 1, row_length: int = ROW, **settings: Any
) -> ConversationStream:
    return ConversationStream(
        conversations, formatter(row_length, **settings), row_length=row_length, seed=seed, name="sft"
    )


def ids(batch: PackedBatch) -> list[list[str]]:
    return [[conversation.id for conversation in row] for row in batch.rows]


def drawn(conversations: ConversationSet, batches: int, rows: int = 3, **settings: Any) -> list[list[list[str]]]:
    one = stream(conversations, **settings)
    return [ids(one.next_batch(rows)) for _ in range(batches)]


def test_an_epoch_holds_every_conversation_once(conversations: ConversationSet) -> None:
    one, seen = stream(conversations), []
    while one.epochs < 3:
        batch = one.next_batch(3)
        seen += [conversation.id for row in batch.rows for conversation in row]
        assert all(row and sum(map(len, row)) <= ROW for row in batch.rows)
        assert batch.tokens > 0.6 * 3 * ROW  # rows are nearly full: conversations have 22 to 55 tokens
        assert batch.conversations == sum(map(len, batch.rows))
        assert batch.trained_tokens == sum(sum(c.trained) for row in batch.rows for c in row)
    # First fit may put a conversation in an earlier row, never in another batch: batches hold consecutive draws.
    counts = Counter(seen)
    assert set(counts.values()) <= {3, 4} and len(counts) == 37
    assert Counter(seen[:30]).most_common(1)[0][1] == 1 and seen[:37] != seen[37:74]


def test_order_and_seed(conversations: ConversationSet) -> None:
    assert drawn(conversations, 6) == drawn(conversations, 6)
    assert drawn(conversations, 6) != drawn(conversations, 6, seed=2)


def test_any_state_goes_on_as_the_stream(conversations: ConversationSet) -> None:
    """The prefetching thread is ahead of the state that is saved."""
    one = stream(conversations, row_length=40)
    for _ in range(12):
        state = json.loads(json.dumps(one.state_dict()))
        other = stream(conversations, row_length=40)
        other.load_state_dict(state)
        expected, found = one.next_batch(3), other.next_batch(3)
        assert found.rows == expected.rows and one.state_dict() == other.state_dict()
        other.next_batch(5)  # another number of rows than the thread expected
    assert one.truncated > 0


def test_too_long_is_skipped_and_counted(conversations: ConversationSet) -> None:
    one = stream(conversations, row_length=40, overlong="skip")
    while one.epochs < 1:
        assert all(len(c) <= 40 for row in one.next_batch(2).rows for c in row)
    long = sum(len(formatter(1000).encode(conversations[index])[0]) > 40 for index in range(37))
    assert 0 < long < 37 and one.skipped >= long and one.truncated == 0
    with pytest.raises(ConfigurationError, match="not one of the 37 conversations fits --seq-length"):
        stream(conversations, row_length=10, overlong="skip").next_batch(1)


def test_in_order(conversations: ConversationSet) -> None:
    packed = pack_in_order(conversations, formatter(), row_length=ROW)
    rows = packed.batch.rows
    assert (packed.skipped, packed.truncated) == (0, 0)
    assert [c.id for row in rows for c in row] == [f"c{row}" for row in range(37)]
    assert all(sum(map(len, row)) <= ROW for row in rows)
    for before, after in zip(rows, rows[1:], strict=False):
        assert sum(map(len, before)) + len(after[0]) > ROW


def test_what_is_left_out_of_a_file_in_order_is_counted(conversations: ConversationSet) -> None:
    lengths = [len(formatter(1000).encode(conversations[index])[0]) for index in range(37)]
    long = sum(length > 40 for length in lengths)
    packed = pack_in_order(conversations, formatter(40, overlong="skip"), row_length=ROW)
    assert (packed.skipped, packed.truncated, packed.batch.conversations) == (long, 0, 37 - long)
    cut = pack_in_order(conversations, formatter(40), row_length=ROW)
    assert cut.skipped + cut.truncated == long and cut.truncated > 0
    assert cut.batch.conversations == 37 - cut.skipped
    assert packed.summary("held out") == (
        f"held out: {37 - long} conversations, {packed.batch.trained_tokens} assistant tokens in "
        f"{len(packed.batch.rows)} rows; {long} skipped, 0 truncated at --seq-length"
    )
    with pytest.raises(ConfigurationError, match="not one of the 37 conversations fits --seq-length"):
        pack_in_order(conversations, formatter(10, overlong="skip"), row_length=ROW)


# Conversations that are split ------------------------------------------------------------------------------------

# A turn says whether it was the last one when it was written, so each of several turns gets a sequence of its own.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if loop.last and m.role == 'assistant' %}!{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


def split_set(folder: Path, turns: Sequence[int], *, words: int = 6) -> ConversationSet:
    """Conversations of so many turns each."""
    rows = [{"id": f"c{row}", "messages": [{"role": role, "content": f"{row}" * (words + row % 3)}
                                           for _ in range(count) for role in ("user", "assistant")]}
            for row, count in enumerate(turns)]  # fmt: skip
    path = folder / "split.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ConversationSet([path], flag="--conversations")


def marked_formatter(max_length: int = 200, overlong: str = "truncate-right") -> ConversationFormatter:
    return ConversationFormatter(
        make_tokenizer(chat_template=MARKED), template_kwargs={}, end_of_sequence_ids=[2], max_length=max_length,
        overlong=overlong,
    )  # fmt: skip


def marked_stream(found: ConversationSet, *, row_length: int = 200, **settings: Any) -> ConversationStream:
    return ConversationStream(found, marked_formatter(row_length, **settings), row_length=row_length, seed=1, name="s")


TURNS = [1, 3, 2, 1, 4, 3, 2, 5, 1, 2, 4]


def test_a_split_conversation_lies_in_one_batch_and_counts_once(tmp_path: Path) -> None:
    one, seen = marked_stream(split_set(tmp_path, TURNS)), Counter[str]()
    while one.epochs < 4:
        batch = one.next_batch(4)
        sequences = [sequence for row in batch.rows for sequence in row]
        assert all(sum(map(len, row)) <= 200 for row in batch.rows)
        parts: dict[str, set[int]] = {}
        for sequence in sequences:
            parts.setdefault(sequence.id, set()).add(sequence.part)
        assert all(found == set(range(TURNS[int(name[1:])])) for name, found in parts.items())
        number_of = Counter(sequence.id for sequence in sequences if sequence.part == 0)
        assert batch.conversations == number_of.total()
        seen += number_of
    assert set(seen.values()) <= {4, 5} and len(seen) == len(TURNS) and one.truncated == one.skipped == 0
    several = [count for count in TURNS if count > 1]
    assert one.split == sum(count for name, count in seen.items() if TURNS[int(name[1:])] > 1) >= 4 * len(several)


def test_a_state_of_split_conversations_goes_on(tmp_path: Path) -> None:
    found = split_set(tmp_path, TURNS)
    one = marked_stream(found)
    for _ in range(6):
        state = json.loads(json.dumps(one.state_dict()))
        other = marked_stream(found)
        other.load_state_dict(state)
        assert other.next_batch(4).rows == one.next_batch(4).rows and one.state_dict() == other.state_dict()
    state = one.state_dict()
    assert state["split"] == one.split > 0
    older = marked_stream(found)
    older.load_state_dict({key: value for key, value in state.items() if key != "split"})
    assert older.split == 0 and older.next_batch(4).rows == one.next_batch(4).rows
    for wrong, words in ((-1, "is out of range"), (1.0, 'no valid "split"'), ("1", 'no valid "split"')):
        with pytest.raises(ConfigurationError, match=words):
            older.load_state_dict({**state, "split": wrong})


def test_the_next_conversation_may_leave_rows_empty(tmp_path: Path) -> None:
    found = split_set(tmp_path, [3] * 5, words=8)
    one = marked_stream(found, row_length=100)
    batch = one.next_batch(4)
    assert [len(row) for row in batch.rows] == [1, 1, 1, 0] and batch.conversations == 1
    assert one.split == 1


@pytest.mark.parametrize(("turns", "rows"), [(4, 2), (5, 3)])
def test_a_batch_that_cannot_hold_one_conversation(tmp_path: Path, turns: int, rows: int) -> None:
    found = split_set(tmp_path, [turns], words=20)
    with pytest.raises(ConfigurationError) as caught:
        marked_stream(found, row_length=300).next_batch(rows)
    line = str(caught.value)
    assert line.startswith(f"--conversations: {tmp_path / 'split.jsonl'} line 1: ") and "\n" not in line
    assert f"split into {turns} sequences, which do not fit a batch of {rows} rows; raise --global-batch-size" in line
    assert marked_stream(found, row_length=300).next_batch(turns).conversations == 1


def test_split_conversations_in_order(tmp_path: Path) -> None:
    found = split_set(tmp_path, TURNS)
    packed = pack_in_order(found, marked_formatter(), row_length=200)
    order = [(s.id, s.part) for row in packed.batch.rows for s in row]
    assert order == [(f"c{row}", part) for row, count in enumerate(TURNS) for part in range(count)]
    assert (packed.split, packed.batch.conversations, packed.skipped, packed.truncated) == (8, 11, 0, 0)
    assert packed.summary("held out").endswith("0 truncated at --seq-length, 8 split into their turns")
    # Those of which a sequence is too long are left out as a whole, or cut and counted once.
    long = sum(marked_formatter().encode(found[index])[-1].token_ids[60:] != [] for index in range(len(TURNS)))
    skipped = pack_in_order(found, marked_formatter(60, "skip"), row_length=200)
    assert (skipped.skipped, skipped.batch.conversations) == (long, len(TURNS) - long) and 0 < long < len(TURNS)
    cut = pack_in_order(found, marked_formatter(60), row_length=200)
    assert (cut.truncated, cut.batch.conversations, cut.skipped) == (long, len(TURNS), 0)


# Turns that the length limit cuts off -------------------------------------------------------------------------------


def cut_stream(conversations: ConversationSet) -> ConversationStream:
    return ConversationStream(conversations, marked_formatter(60), row_length=120, seed=3, name="sft")


def test_turns_that_are_cut_off_are_counted(tmp_path: Path) -> None:
    found = split_set(tmp_path, TURNS)
    expected = []
    for row in found:
        one = marked_formatter(60)
        one.encode(row)
        expected.append(one.turns_dropped)
    assert sum(expected) > 0 and 0 in expected
    packed = pack_in_order(found, marked_formatter(60), row_length=120)
    assert packed.turns_dropped == sum(expected)
    assert packed.summary("held out").endswith(f", {sum(expected)} turns cut off")
    stream, drawn = cut_stream(found), Counter[str]()
    for _ in range(9):
        drawn.update(s.id for row in stream.next_batch(2).rows for s in row if s.part == 0)
        of_row = {row.id: count for row, count in zip(found, expected, strict=True)}
        assert stream.turns_dropped == sum(of_row[name] * count for name, count in drawn.items())
    state = stream.state_dict()
    resumed = cut_stream(found)
    resumed.load_state_dict(state)
    assert resumed.turns_dropped == state["turns_dropped"] == stream.turns_dropped > 0
    older = cut_stream(found)
    older.load_state_dict({key: value for key, value in state.items() if key != "turns_dropped"})
    assert older.turns_dropped == 0 and older.next_batch(2).rows == stream.next_batch(2).rows
    with pytest.raises(ConfigurationError, match="is out of range"):
        cut_stream(found).load_state_dict({**state, "turns_dropped": -1})
