"""Microbatches of rows that hold several conversations each, which must not see one another.

Two forms, by ``--transformer-impl``. Transformer Engine's attention takes packed sequences: all rows of a microbatch
behind each other as one, without padding, and where each conversation ends (``PackedSeqParams``). Megatron's local
attention takes a mask: rows stay rows, padded to the longest, and a token sees those of its own conversation up to
itself; memory grows with the square of the row. Rotary positions need no reset there: only differences of positions
within a conversation enter.
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
    """Groups of ``size`` rows (the last may be smaller), each a :class:`Microbatch`.

    Its ``rows`` say which of ``rows`` a trained token is in, its ``columns`` at which place there. ``length_multiple``:
    sequences are padded to a multiple of it (sequence parallelism).
    """
    pack = _masked_rows if transformer_impl == "local" else _one_sequence
    numbered = list(enumerate(rows))
    groups = [numbered[start : start + size] for start in range(0, len(numbered), size)]
    return [pack(group, length_multiple, device) for group in groups]


def _masked_rows(group: Sequence[tuple[int, PackedRow]], length_multiple: int, device: torch.device) -> Microbatch:
    """[b, S] with a mask [b, 1, S, S] bool, True where a token must not look."""
    lengths = [sum(map(len, row)) for _, row in group]
    width = _rounded(max(lengths), length_multiple)
    tokens = torch.zeros(len(group), width, dtype=torch.int64)
    # Padding is a conversation of its own: a token that sees nothing at all would have no softmax.
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
    """[1, T]: the rows' conversations behind each other, then padding as one more sequence."""
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
    """Token ids, number of the conversation, and whether the prediction of the token is trained; all [T]."""
    tokens = torch.tensor([token for conversation in row for token in conversation.token_ids])
    owner = torch.arange(len(row)).repeat_interleave(torch.tensor([len(conversation) for conversation in row]))
    # The first token of a conversation is predicted by nothing.
    trained = [place > 0 and flag for conversation in row for place, flag in enumerate(conversation.trained)]
    return tokens, owner, torch.tensor(trained)


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
