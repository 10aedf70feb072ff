"""Micro-batches: whole sequences packed into one row, for layers that keep them apart by where each ends.

A micro-batch knows which of its positions predict tokens that matter. The hidden state at position p predicts token
p + 1, so response token t of a sequence with prompt length P is predicted at P - 1 + t. Other positions never reach the
output head. Under context parallelism a rank holds its chunks of every sequence, and the predictions made there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.model.attention import PackedSequences, in_order
from megatron_camopd.model.packing import PackingRule


@dataclass(frozen=True, eq=False)
class Piece:
    """One sequence of a micro-batch, and the n tokens of it whose predictions matter.

    Attributes:
        token_ids: [L] int64 on the CPU.
        places: [n] int64, the places of those tokens in the sequence, at least 1.
        row: Number of the sequence in the batch that it comes from.
        columns: [n] int64, the columns of those tokens there (for a rollout the response columns).
    """

    token_ids: Tensor
    places: Tensor
    row: int
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Input of one forward pass, with the N tokens whose predictions matter, of this context-parallel rank.

    Attributes:
        tokens: [1, T] int64 on the accelerator.
        position_ids: [1, T] int64 on the accelerator.
        positions: [N] int64 on the accelerator: the position that predicts each token.
        targets: [N] int64 on the accelerator: the id of each token.
        rows: [N] int64 on the CPU: the row of each token in the batch that the micro-batch was packed from.
        columns: [N] int64 on the CPU: the column of each token there.
        packed: Where each sequence ends, among the tokens of all context-parallel ranks.
        padded_tokens: Number of tokens that the transformer processes on all context-parallel ranks, with padding.
    """

    tokens: Tensor
    position_ids: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    packed: PackedSequences
    padded_tokens: int


def response_pieces(rollout: RolloutBatch, rows: Tensor, wanted: Tensor | None = None) -> list[Piece]:
    """Return the sequences of some rows of a rollout.

    Args:
        rollout: Batch of N samples with responses of at most R tokens.
        rows: [M] int64 rows of ``rollout``.
        wanted: [N, R] bool: the response tokens whose predictions matter (default: all).
    """
    mask = rollout.response_mask if wanted is None else rollout.response_mask & wanted
    pieces = []
    for row in rows.tolist():
        prompt, response = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        columns = mask[row].nonzero().flatten()
        pieces.append(Piece(rollout.tokens[row, : prompt + response], prompt + columns, row, columns))
    return pieces


def make_microbatches(
    groups: Sequence[Sequence[Piece]], rule: PackingRule, *, device: torch.device
) -> list[Microbatch]:
    """Make one micro-batch of each of ``groups``.

    Args:
        groups: The sequences of each micro-batch. An empty one gives a filler: padding that predicts nothing.
        rule: How they are packed.
        device: Device of the tensors that the model reads.
    """
    return [_pack(group, rule, device) for group in groups]


def _pack(group: Sequence[Piece], rule: PackingRule, device: torch.device) -> Microbatch:
    """Make one micro-batch: the sequences one after the other, then padding as one more sequence."""
    lengths = [rule.padded(len(piece.token_ids)) for piece in group]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    padding = rule.padded_total(max(1, int(starts[-1]))) - int(starts[-1])
    lengths += [padding] * (padding > 0)
    total = sum(lengths)
    tokens, position_ids = torch.zeros(total, dtype=torch.int64), torch.cat([torch.arange(n) for n in lengths])
    for piece, start in zip(group, starts.tolist(), strict=False):
        tokens[start : start + len(piece.token_ids)] = piece.token_ids
    empty = torch.zeros(0, dtype=torch.int64)
    wanted = torch.cat([empty, *(start + piece.places for piece, start in zip(group, starts, strict=False))])
    rows = torch.cat([empty, *(torch.full_like(piece.places, piece.row) for piece in group)])
    columns = torch.cat([empty, *(piece.columns for piece in group)])
    targets = tokens[wanted]

    # This rank's tokens, and where the position that predicts each wanted token lies among them.
    held = total // rule.context_ranks
    places = in_order(lengths, rule.context_ranks, held) if rule.context_ranks > 1 else torch.arange(total)
    own = places // held == rule.context_rank
    own_order = torch.empty(held, dtype=torch.int64)
    own_order[places[own] % held] = own.nonzero().flatten()
    here = own[wanted - 1]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return Microbatch(
        tokens=tokens[own_order][None].to(device),
        position_ids=position_ids[own_order][None].to(device),
        positions=(places[wanted - 1][here] % held).to(device),
        targets=targets[here].to(device),
        rows=rows[here],
        columns=columns[here],
        packed=PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=tuple(lengths),
            order=places.to(device),
        ),
        padded_tokens=total,
    )
