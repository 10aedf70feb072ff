"""Draw vocabulary ids from the rows of the head, many a row at the price of one product.

A uniform number u in [0, 1) names the id at which the row's cumulative probability passes u (inversion). Probabilities
are first made integers, round(2^42 p / p_max): their sums are exact in 64 bits, so the same u names the same id
whatever the order of summation, the tiles or the shards of the vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels.products import empty_logits, logits_into
from megatron_camopd.kernels.rows import row_operations
from megatron_camopd.kernels.rows_torch import row_groups
from megatron_camopd.kernels.vocab_parallel import (
    RowStatistics,
    VocabShard,
    check_head_inputs,
    chunk_size,
    merge_partials,
    no_columns,
    token_chunks,
)

_UNIT = 2.0**42  # the most likely id's integer; 2^20 ids of it still fit into 63 bits


@torch.no_grad()
def sample_ids(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids drawn from softmax(hidden weight^T / temperature), and their log-probabilities; without gradient.

    hidden, weight, temperature, valid_vocab_size, tp_group, chunk_tokens: as for ``linear_logprob``.
    uniforms: [N, D] float64 (or fp32) in [0, 1), the same on every rank: D draws a row, with replacement.

    Returns (ids [N, D] int64, logprob [N, D] fp32, nats), the same on every rank. A row whose logits hold NaN or +inf
    has ids -1 and log-probabilities NaN. Raises ValueError for shapes or settings that do not fit, TypeError for
    dtypes.
    """
    check_head_inputs(hidden, weight, temperature, chunk_tokens)
    if uniforms.dim() != 2 or uniforms.shape[0] != hidden.shape[0]:
        raise ValueError(f"uniforms {tuple(uniforms.shape)} is not [N, D] with N = {hidden.shape[0]}")
    shard = VocabShard.of(weight, valid_vocab_size, tp_group)
    real, count, device = weight[: shard.valid], hidden.shape[0], hidden.device
    # Of this rank's draws; those of other ranks lose against theirs. Ids are exact in float64.
    drawn = torch.full((2, *uniforms.shape), -torch.inf, dtype=torch.float64, device=device)
    size = chunk_tokens or chunk_size(count, shard.valid, device)
    workspace = empty_logits(min(size, count), shard.valid, device)
    for rows in token_chunks(count, size):
        logits = logits_into(workspace[: rows.stop - rows.start], hidden[rows], real)
        _draw(logits, uniforms[rows].double(), 1.0 / temperature, shard, drawn[:, rows])
    ids, logprob = shard.gather(drawn).amax(dim=0)
    nobody = ids == -torch.inf
    return ids.masked_fill(nobody, -1).long(), logprob.masked_fill(nobody, torch.nan).float()


def _draw(logits: Tensor, uniforms: Tensor, inverse_temperature: float, shard: VocabShard, out: Tensor) -> None:
    """Write ids and log-probabilities [2, C, D] of the draws that fall on this rank's columns ``logits`` [C, valid]."""
    partials = no_columns(len(logits), 0, logits.device)
    if shard.valid:
        none = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        partials = row_operations(logits.device.type).partial_statistics(logits, none, inverse_temperature)
    statistics = RowStatistics.of(merge_partials(shard.gather(partials)))

    def integers(rows: slice) -> Tensor:
        scaled = (logits[rows] * inverse_temperature).sub_(statistics.top[rows, None])
        return scaled.exp_().nan_to_num_(nan=0.0).mul_(_UNIT).round_().long()

    own = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    groups = list(row_groups(logits)) if shard.valid else []
    for rows in groups:
        own[rows] = integers(rows).sum(dim=1)
    masses = shard.gather(own)  # [ranks, C]
    total = masses.sum(dim=0).masked_fill(~statistics.log_mass.isfinite(), 0)  # a broken row: no id is drawn
    before = masses[: shard.first // shard.width].sum(dim=0)
    points = torch.minimum((uniforms * total[:, None]).long(), total[:, None] - 1) - before[:, None]
    for rows in groups:
        columns = torch.searchsorted(integers(rows).cumsum(dim=1), points[rows], right=True)
        mine = (points[rows] >= 0) & (points[rows] < own[rows, None])
        columns = columns.clamp(max=shard.valid - 1)
        chosen = logits[rows].gather(1, columns) * inverse_temperature
        logprob = (chosen - statistics.top[rows, None]) - statistics.log_mass[rows, None]
        out[0, rows] = (columns + shard.first).double().masked_fill(~mine, -torch.inf)
        out[1, rows] = logprob.double().masked_fill(~mine, -torch.inf)
