"""Micro-batches cut from a rollout: rows of similar length, padded to the longest of them.

A micro-batch knows which positions of its [batch, sequence] grid predict response tokens. The hidden state at
position p predicts token p + 1, so response token t of a row with prompt length P is predicted at P - 1 + t.
Prompt and padding positions never reach the output head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch


@dataclass(frozen=True)
class Microbatch:
    """Input of one forward pass, with the N tokens whose predictions matter.

    Attributes:
        tokens: [b, S] int64 on the accelerator.
        position_ids: [b, S] int64 on the accelerator.
        positions: [N] int64 on the accelerator: the position in the flattened [b, S] grid that predicts each token.
        targets: [N] int64 on the accelerator: the id of each token.
        rows: [N] int64 on the CPU: the row of each token in the batch that the micro-batch was cut from.
        columns: [N] int64 on the CPU: the column of each token there (for a rollout its response column).
        attention: Keyword arguments of the model where a row holds several sequences: ``attention_mask`` or
            ``packed_seq_params``. Empty where a row holds one sequence: causal attention never reaches right padding.
    """

    tokens: Tensor
    position_ids: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    attention: dict[str, Any] = field(default_factory=dict)

    @property
    def padded_tokens(self) -> int:
        """Number of tokens that the transformer processes, padding included."""
        return int(self.tokens.numel())


def make_microbatches(
    rollout: RolloutBatch,
    groups: Sequence[Tensor],
    *,
    length_multiple: int,
    device: torch.device,
    wanted: Tensor | None = None,
) -> list[Microbatch]:
    """Make one :class:`Microbatch` of each element of ``groups``.

    Args:
        rollout: Batch of N samples with responses of at most R tokens.
        groups: For each micro-batch the rows of ``rollout`` that it holds, [b] int64.
        length_multiple: Sequences are padded to the longest of their micro-batch, rounded up to a multiple of this
            (under sequence parallelism the tensor-parallel size, since each rank gets an equal part of the sequence).
        device: Device of the tensors that the model reads.
        wanted: [N, R] bool: the response tokens whose predictions matter (default: all); the others never reach the
            output head.
    """
    mask = rollout.response_mask if wanted is None else rollout.response_mask & wanted
    microbatches = []
    for rows in groups:
        lengths = rollout.prompt_lengths[rows] + rollout.response_lengths[rows]
        width = -(-int(lengths.max()) // length_multiple) * length_multiple
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        shared = min(width, rollout.tokens.shape[1])
        tokens[:, :shared] = rollout.tokens[rows, :shared]
        tokens.masked_fill_(torch.arange(width)[None, :] >= lengths[:, None], 0)
        row_in_group, columns = mask[rows].nonzero(as_tuple=True)
        target_position = rollout.prompt_lengths[rows][row_in_group] + columns
        microbatches.append(
            Microbatch(
                tokens=tokens.to(device),
                position_ids=torch.arange(width, device=device).expand(len(rows), width),
                positions=(row_in_group * width + target_position - 1).to(device),
                targets=tokens[row_in_group, target_position].to(device),
                rows=rows[row_in_group],
                columns=columns,
            )
        )
    return microbatches


def groups_by_length(rollout: RolloutBatch, size: int) -> list[Tensor]:
    """Split all rows into groups of at most ``size``, longest first, so that each group needs little padding."""
    order = torch.argsort(rollout.prompt_lengths + rollout.response_lengths, descending=True, stable=True)
    return list(order.split(size))


def share_of_selection(
    rollout: RolloutBatch, selected: Tensor, *, rank: int, ranks: int, size: int
) -> tuple[list[Tensor], int]:
    """Return this data-parallel rank's groups of the ``selected`` rows, and how many of the groups are not fillers.

    Samples are dealt out to the ranks longest first, so that all ranks get the same number of samples, give or take
    one, of similar lengths. Every rank returns the same number of groups, because the ranks must run the same number of
    micro-batches. A rank with fewer groups adds fillers at the end: groups of one, the shortest row of the batch, to be
    trained with coefficient zero.

    Args:
        rollout: The global batch.
        selected: [K] int64 rows of ``rollout``.
        rank: Rank within the data-parallel group.
        ranks: Size of the data-parallel group.
        size: Largest number of rows in a group.
    """
    lengths = rollout.prompt_lengths + rollout.response_lengths
    order = selected[torch.argsort(lengths[selected], descending=True, stable=True)]
    groups = [group for group in order[rank::ranks].split(size) if len(group)]
    most = -(-len(order) // ranks)  # samples of the fullest rank
    wanted = max(1, -(-most // size))
    filler = torch.argmin(lengths).reshape(1)
    return groups + [filler] * (wanted - len(groups)), len(groups)
