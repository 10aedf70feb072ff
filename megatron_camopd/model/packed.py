"""Micro-batches of packed rows: a row holds several conversations, which must not attend to each other.

The form depends on ``--transformer-impl``. Transformer Engine's attention takes packed sequences: all rows of a
micro-batch are concatenated to one sequence, and ``PackedSeqParams`` says where each conversation ends. Megatron's
local attention takes a mask: rows are padded to the longest, and a token attends to the tokens of its own conversation
up to itself; the memory of the mask grows with the square of the row length. With a mask, positions run through the
whole row: rotary embeddings depend only on differences of positions, so they need no reset at each conversation.
"""

from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_camopd.data import PackedRow
from megatron_camopd.model.microbatch import Microbatch


def pack_microbatches(
    rows: Sequence[PackedRow], *, size: int, length_multiple: int, device: torch.device, transformer_impl: str
) -> list[Microbatch]:
    """Make one :class:`Microbatch` of every ``size`` rows (the last may have fewer).

    ``Microbatch.rows`` and ``.columns`` say which of ``rows`` each trained token is in, and at which position there.

    Args:
        rows: Packed rows.
        size: Largest number of rows in a micro-batch.
        length_multiple: Sequences are padded to a multiple of this (for sequence parallelism).
        device: Device of the tensors that the model reads.
        transformer_impl: Megatron's layers: "local" or "transformer_engine".
    """
    pack = _masked_rows if transformer_impl == "local" else _one_sequence
    numbered = list(enumerate(rows))
    groups = [numbered[start : start + size] for start in range(0, len(numbered), size)]
    return [pack(group, length_multiple, device) for group in groups]


def _masked_rows(group: Sequence[tuple[int, PackedRow]], length_multiple: int, device: torch.device) -> Microbatch:
    """Make a [b, S] micro-batch with an attention mask [b, 1, S, S] bool, True where attention is forbidden."""
    lengths = [sum(map(len, row)) for _, row in group]
    width = _rounded(max(lengths), length_multiple)
    tokens = torch.zeros(len(group), width, dtype=torch.int64)
    # Padding counts as one more conversation: the softmax over an empty set would be NaN.
    owner = torch.full((len(group), width), -1, dtype=torch.int64)
    trained = torch.zeros(len(group), width, dtype=torch.bool)
    for place, (_, row) in enumerate(group):
        tokens[place, : lengths[place]], owner[place, : lengths[place]], trained[place, : lengths[place]] = _flat(row)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    visible = (owner[:, :, None] == owner[:, None, :]) & causal
    in_group, columns = trained.nonzero(as_tuple=True)
    return Microbatch(
        tokens=tokens.to(device),
        position_ids=torch.arange(width, device=device).expand(len(group), width),
        positions=(in_group * width + columns - 1).to(device),
        targets=tokens[in_group, columns].to(device),
        rows=torch.tensor([number for number, _ in group])[in_group],
        columns=columns,
        attention={"attention_mask": ~visible[:, None].to(device)},
    )


def _one_sequence(group: Sequence[tuple[int, PackedRow]], length_multiple: int, device: torch.device) -> Microbatch:
    """Make a [1, T] micro-batch: the conversations of all rows concatenated, then padding as one more sequence."""
    flat = [_flat(row) for _, row in group]
    tokens, trained = torch.cat([part[0] for part in flat]), torch.cat([part[2] for part in flat])
    lengths = [len(conversation) for _, row in group for conversation in row]
    padding = _rounded(len(tokens), length_multiple) - len(tokens)
    if padding:
        tokens = torch.nn.functional.pad(tokens, (0, padding))
        lengths.append(padding)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    targets = trained.nonzero().flatten()
    row_lengths = torch.tensor([len(part[0]) for part in flat])
    in_group = torch.arange(len(group)).repeat_interleave(row_lengths)[targets]
    first = row_lengths.cumsum(0) - row_lengths
    return Microbatch(
        tokens=tokens[None].to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        positions=(targets - 1).to(device),
        targets=tokens[targets].to(device),
        rows=torch.tensor([number for number, _ in group])[in_group],
        columns=targets - first[in_group],
        attention={
            "packed_seq_params": PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                max_seqlen_q=max(lengths),
                max_seqlen_kv=max(lengths),
            )
        },
    )


def _flat(row: PackedRow) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's id, the number of its conversation, and whether its prediction is trained; all [T]."""
    tokens = torch.tensor([token for conversation in row for token in conversation.token_ids])
    owner = torch.arange(len(row)).repeat_interleave(torch.tensor([len(conversation) for conversation in row]))
    # No token predicts the first one of a conversation.
    trained = [place > 0 and flag for conversation in row for place, flag in enumerate(conversation.trained)]
    return tokens, owner, torch.tensor(trained)


def _rounded(length: int, multiple: int) -> int:
    """Round ``length`` up to a multiple of ``multiple``."""
    return -(-length // multiple) * multiple
