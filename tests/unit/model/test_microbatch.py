"""Packing a batch: each sequence whole, positions and targets where they belong, on every context-parallel rank."""

from typing import Any

import pytest
import torch

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.data import EncodedConversation
from megatron_camopd.model.microbatch import Microbatch, Piece, make_microbatches, response_pieces
from megatron_camopd.model.packing import PackingRule
from megatron_camopd.model.supervised import _piece

CPU = torch.device("cpu")


def make_rollout(lengths: list[tuple[int, int]], *, spare: int = 3) -> RolloutBatch:
    """A batch of (prompt, response) lengths; no two tokens are alike, and the padding is not zero."""
    count, width = len(lengths), max(map(sum, lengths)) + spare
    return RolloutBatch(
        indices=torch.arange(count),
        tokens=1 + torch.arange(count * width).reshape(count, width),
        prompt_lengths=torch.tensor([prompt for prompt, _ in lengths]),
        response_lengths=torch.tensor([response for _, response in lengths]),
        rollout_logprobs=torch.zeros(count, max(response for _, response in lengths) + spare),
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def random_rollout(count: int, seed: int) -> RolloutBatch:
    lengths = torch.randint(1, 19, (count, 2), generator=torch.Generator().manual_seed(seed))
    return make_rollout([(int(prompt), int(response)) for prompt, response in lengths])


def rule(ranks: int = 1, rank: int = 0, **changes: Any) -> PackingRule:
    multiple = 2 * ranks if ranks > 1 else 1
    given = {"max_tokens": 48, "sequence_multiple": multiple, "total_multiple": multiple} | changes
    return PackingRule(**given, context_ranks=ranks, context_rank=rank)


def microbatches(pieces: list[Piece], how: PackingRule) -> list[Microbatch]:
    bins = how.bins([len(piece.token_ids) for piece in pieces])
    return make_microbatches([[pieces[place] for place in places] for places in bins], how, device=CPU)


def ends(part: Microbatch) -> list[int]:
    assert part.packed.qkv_format == "thd" and torch.equal(part.packed.cu_seqlens_q, part.packed.cu_seqlens_kv)
    assert part.packed.cu_seqlens_q.dtype == torch.int32
    found: list[int] = part.packed.cu_seqlens_q.tolist()
    lengths = [end - start for start, end in zip(found[:-1], found[1:], strict=True)]
    assert part.packed.max_seqlen_q == part.packed.max_seqlen_kv == max(lengths)
    assert part.packed.lengths == tuple(lengths)
    return found


def whole(parts: list[Microbatch]) -> tuple[list[int], list[int]]:
    """Tokens and position ids of a micro-batch, from those of all context-parallel ranks by the rule of zig-zag."""
    ranks, total = len(parts), parts[0].padded_tokens
    tokens, places = [-1] * total, [-1] * total
    for rank, part in enumerate(parts):
        assert ends(part) == ends(parts[0]) and part.padded_tokens == total and part.tokens.shape == (1, total // ranks)
        held = iter(zip(part.tokens[0].tolist(), part.position_ids[0].tolist(), strict=True))
        limits = ends(part)
        for start, end in zip(limits[:-1], limits[1:], strict=True):
            chunk = (end - start) / (2 * ranks) if ranks > 1 else (end - start) / 2
            for number in (rank, 2 * ranks - 1 - rank):
                for place in range(start + int(number * chunk), start + int((number + 1) * chunk)):
                    tokens[place], places[place] = next(held)
        assert next(held, None) is None
    return tokens, places


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("total_multiple", [1, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_sequences_and_predictions(ranks: int, total_multiple: int, seed: int) -> None:
    rollout = random_rollout(9, seed)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.rand(rollout.rollout_logprobs.shape, generator=generator) < (0.0, 0.5, 1.0)[seed]
    rows = torch.tensor([8, 2, 3, 5, 0, 7])
    multiple = max(total_multiple, 2 * ranks)
    packed = [
        microbatches(response_pieces(rollout, rows, wanted), rule(ranks, rank, total_multiple=multiple))
        for rank in range(ranks)
    ]
    found: list[tuple[int, int]] = []
    seen: list[int] = []
    for parts in zip(*packed, strict=True):
        tokens, numbers = whole(list(parts))
        assert len(tokens) % multiple == 0 and len(tokens) <= 48
        limits = ends(parts[0])
        for start, end in zip(limits[:-1], limits[1:], strict=True):
            assert numbers[start:end] == list(range(end - start))
            if tokens[start]:  # else it is padding
                row = next(row for row in rows.tolist() if rollout.tokens[row, 0] == tokens[start])
                length = int(rollout.lengths[row])
                assert tokens[start:end] == rollout.tokens[row, :length].tolist() + [0] * (end - start - length)
                seen.append(row)
        for part in parts:
            before = part.tokens[0, part.positions]
            assert torch.equal(before + 1, part.targets)  # tokens of a row count up by one
            assert torch.equal(
                rollout.tokens[part.rows, rollout.prompt_lengths[part.rows] + part.columns], part.targets
            )
            found += zip(part.rows.tolist(), part.columns.tolist(), strict=True)
    assert sorted(seen) == sorted(rows.tolist())
    mask = rollout.response_mask & wanted
    assert sorted(found) == [(row, column) for row, column in mask.nonzero().tolist() if row in rows.tolist()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fillers_predict_nothing(ranks: int) -> None:
    for count in (1, 3):
        parts = make_microbatches([[]] * count, rule(ranks, 1 % ranks, total_multiple=4 * ranks), device=CPU)
        assert len(parts) == count
        for part in parts:
            assert part.tokens.tolist() == [[0] * 4] and part.padded_tokens == 4 * ranks
            assert not len(part.positions) and not len(part.targets) and not len(part.rows) and not len(part.columns)
            assert ends(part) == [0, 4 * ranks]


CONVERSATIONS = [
    EncodedConversation("a", [5, 6, 7], [True, False, True]), EncodedConversation("b", [8, 9], [False, True]),
    EncodedConversation("c", [1, 2, 3, 4, 5, 6], [False, False, True, True, False, True]),
    EncodedConversation("d", [9], [True]), EncodedConversation("e", [3, 2, 1], [False, True, True]),
]  # fmt: skip
# (conversation, place) of every token whose prediction is trained: the first of a conversation is predicted by nothing.
TRAINED = [(0, 2), (1, 1), (2, 2), (2, 3), (2, 5), (4, 1), (4, 2)]


def test_trained_tokens_of_conversations() -> None:
    pieces: list[Piece] = [_piece(number, one) for number, one in enumerate(CONVERSATIONS)]
    (part,) = microbatches(pieces, rule(total_multiple=4))
    assert part.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 5, 6, 7, 3, 2, 1, 8, 9, 9, 0]]
    assert ends(part) == [0, 6, 9, 12, 14, 15, 16]
    assert part.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 0, 1, 0, 0]]
    for position, target, row, place in zip(part.positions, part.targets, part.rows, part.columns, strict=True):
        tokens = CONVERSATIONS[row].token_ids
        assert part.tokens[0, position + 1] == target == tokens[place]
        assert part.tokens[0, position] == tokens[place - 1]
    assert sorted(zip(part.rows.tolist(), part.columns.tolist(), strict=True)) == TRAINED
