"""Cut rollouts into microbatches: rows of similar length together, padded to their own longest.

A microbatch knows which positions of its [batch, sequence] grid predict response tokens: the hidden state at
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
    """One forward pass: ``tokens`` and ``position_ids`` [b, S] int64 on the accelerator.

    ``rows`` [N] and ``columns`` [N] (CPU) say which [row of the batch it was cut from, response column] each of
    the N response tokens is; ``positions`` [N] its place in the flattened [b, S] grid; ``targets`` [N] its id.
    ``attention``: what the model must know where rows hold several sequences: its ``attention_mask`` or
    ``packed_seq_params``. Nothing for rows of one: causal attention, and right padding needs no mask.
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
        """Tokens that the transformer computes on, padding included."""
        return self.tokens.numel()


def make_microbatches(
    rollout: RolloutBatch,
    groups: Sequence[Tensor],
    *,
    length_multiple: int,
    device: torch.device,
    wanted: Tensor | None = None,
) -> list[Microbatch]:
    """One :class:`Microbatch` per element of ``groups`` ([b] int64 rows of ``rollout``).

    ``wanted`` [N, R] bool: the response tokens that matter (default: all); others never reach the output head.
    Sequences are padded to the group's longest, rounded up to ``length_multiple`` (the tensor-parallel size under
    sequence parallelism, which splits the sequence evenly).
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
    """All rows in groups of at most ``size``, longest first, so that padding within a group stays small."""
    order = torch.argsort(rollout.prompt_lengths + rollout.response_lengths, descending=True, stable=True)
    return list(order.split(size))


def share_of_selection(
    rollout: RolloutBatch, selected: Tensor, *, rank: int, ranks: int, size: int
) -> tuple[list[Tensor], int]:
    """This data-parallel rank's groups of the ``selected`` rows, and how many of them carry coefficients.

    ``selected`` [K] int64 rows of the global ``rollout``. Samples are dealt out longest first, so that every
    rank gets as many (give or take one) of about the same lengths. Every rank returns the same number of
    groups: where it has fewer samples, the shortest row of the batch fills a group of one, to be trained with
    coefficient zero.
    """
    lengths = rollout.prompt_lengths + rollout.response_lengths
    order = selected[torch.argsort(lengths[selected], descending=True, stable=True)]
    groups = [group for group in order[rank::ranks].split(size) if len(group)]
    most = -(-len(order) // ranks)  # samples of the fullest rank
    wanted = max(1, -(-most // size))
    filler = torch.argmin(lengths).reshape(1)
    return groups + [filler] * (wanted - len(groups)), len(groups)
