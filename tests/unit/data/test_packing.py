"""Packed batches: every conversation once an epoch, full rows, the same stream from any state; microbatches of rows."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from megatron_camopd.data import (
    ConversationFormatter,
    ConversationSet,
    ConversationStream,
    PackedBatch,
    pack_in_order,
)
from megatron_camopd.data.conversation_tokens import EncodedConversation
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.model.packed import pack_microbatches
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
    long = sum(len(formatter(1000).encode(conversations[index]) or []) > 40 for index in range(37))
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
    lengths = [len(formatter(1000).encode(conversations[index]) or []) for index in range(37)]
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


# Microbatches -----------------------------------------------------------------------------------------------------

ROWS = [
    [EncodedConversation("a", [5, 6, 7], [True, False, True]), EncodedConversation("b", [8, 9], [False, True])],
    [EncodedConversation("c", [1, 2, 3, 4, 5, 6], [False, False, True, True, False, True])],
    [EncodedConversation("d", [9], [True]), EncodedConversation("e", [3, 2, 1], [False, True, True])],
]
# (row, column) of every token whose prediction is trained: the first of a conversation is predicted by nothing.
TRAINED = [(0, 2), (0, 4), (1, 2), (1, 3), (1, 5), (2, 2), (2, 3)]


def microbatches(transformer_impl: str, *, size: int, length_multiple: int = 1) -> list[Any]:
    return pack_microbatches(
        ROWS, size=size, length_multiple=length_multiple, device=torch.device("cpu"), transformer_impl=transformer_impl
    )


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_trained_tokens_and_their_places(impl: str, size: int) -> None:
    found = []
    for part in microbatches(impl, size=size, length_multiple=4):
        assert part.tokens.shape[1] % 4 == 0
        flat = part.tokens.flatten()
        for position, target, row, column in zip(part.positions, part.targets, part.rows, part.columns, strict=True):
            tokens = [token for conversation in ROWS[row] for token in conversation.token_ids]
            assert flat[position + 1] == target == tokens[column] and flat[position] == tokens[column - 1]
            found.append((int(row), int(column)))
    assert found == TRAINED


def test_a_token_sees_its_own_conversation_up_to_itself() -> None:
    (part,) = microbatches("local", size=3)
    mask = part.attention["attention_mask"]
    assert mask.shape == (3, 1, 6, 6) and mask.dtype == torch.bool
    for number, row in enumerate(ROWS):
        owner = [place for place, conversation in enumerate(row) for _ in conversation.token_ids]
        owner += [-1] * (6 - len(owner))
        for query in range(6):
            for key in range(6):
                assert bool(mask[number, 0, query, key]) == (key > query or owner[key] != owner[query])


def test_packed_sequences_for_transformer_engine() -> None:
    (part,) = microbatches("transformer_engine", size=3, length_multiple=4)
    packed = part.attention["packed_seq_params"]
    assert part.tokens.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 9, 3, 2, 1, 0]]
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 5, 11, 12, 15, 16]
    assert packed.qkv_format == "thd" and packed.max_seqlen_q == packed.max_seqlen_kv == 6
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert part.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 0]]
