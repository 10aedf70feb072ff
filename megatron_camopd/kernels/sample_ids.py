"""Random vocabulary ids drawn from the head's distribution, any number per token with one matrix product.

A uniform number u in [0, 1) selects the first id at which the cumulative probability of the row exceeds u (inverse
transform sampling). Probabilities are first converted to integers, round(2^42 p / p_max), whose sums are exact in 64
bits. The same u therefore selects the same id for any order of summation and any sharding of the vocabulary.
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

_UNIT = 2.0**42  # integer of the most likely id; 2^20 such ids still sum to less than 2^63


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
    """Draw ids from softmax(hidden weight^T / temperature), without gradient.

    Args:
        hidden: as in ``linear_logprob``.
        weight: as in ``linear_logprob``.
        uniforms: [N, D] float64 (or fp32) in [0, 1), the same on every rank; one number for each of D draws with
            replacement per token.
        temperature: as in ``linear_logprob``.
        valid_vocab_size: as in ``linear_logprob``.
        tp_group: as in ``linear_logprob``.
        chunk_tokens: as in ``linear_logprob``.

    Returns:
        (ids [N, D] int64; their log-probabilities [N, D] fp32, nats), the same on every rank. A row whose logits hold
        NaN or +inf has ids -1 and log-probabilities NaN.

    Raises:
        ValueError: shapes or settings do not fit.
        TypeError: a dtype is not supported.
    """
    check_head_inputs(hidden, weight, temperature, chunk_tokens)
    if uniforms.dim() != 2 or uniforms.shape[0] != hidden.shape[0]:
        raise ValueError(f"uniforms {tuple(uniforms.shape)} is not [N, D] with N = {hidden.shape[0]}")
    shard = VocabShard.of(weight, valid_vocab_size, tp_group)
    real, count, device = weight[: shard.valid], hidden.shape[0], hidden.device
    # Ids and log-probabilities of the draws that fall on this rank's columns, -inf for the others, so that the maximum
    # over the ranks below finds the owner's. float64 represents ids exactly.
    drawn = torch.full((2, *uniforms.shape), -torch.inf, dtype=torch.float64, device=device)
    size = chunk_tokens or chunk_size(count, shard.valid, device)
    workspace = empty_logits(min(size, count), shard.valid, device)
    for rows in token_chunks(count, size):
        logits = logits_into(workspace[: rows.stop - rows.start], hidden[rows], real)
        _draw(logits, uniforms[rows].double(), 1.0 / temperature, shard, drawn[:, rows])
    ids, logprob = shard.gather(drawn).amax(dim=0)
    broken = ids == -torch.inf
    return ids.masked_fill(broken, -1).long(), logprob.masked_fill(broken, torch.nan).float()


def _draw(logits: Tensor, uniforms: Tensor, inverse_temperature: float, shard: VocabShard, out: Tensor) -> None:
    """Draw ids for one chunk and write those that fall on this rank's columns.

    Args:
        logits: [C, valid] fp32, this rank's columns before the division by the temperature.
        uniforms: [C, D] float64.
        inverse_temperature: 1 / temperature.
        shard: this rank's columns.
        out: [2, C, D] float64, overwritten with ids (first) and log-probabilities (second); -inf where another rank
            owns the id.
    """
    partials = no_columns(len(logits), 0, logits.device)
    if shard.valid:
        no_targets = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        partials = row_operations(logits.device.type).partial_statistics(logits, no_targets, inverse_temperature)
    statistics = RowStatistics.of(merge_partials(shard.gather(partials)))

    def integers(rows: slice) -> Tensor:
        scaled = (logits[rows] * inverse_temperature).sub_(statistics.top[rows, None])
        return scaled.exp_().nan_to_num_(nan=0.0).mul_(_UNIT).round_().long()

    own = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    groups = list(row_groups(logits)) if shard.valid else []
    for rows in groups:
        own[rows] = integers(rows).sum(dim=1)
    masses = shard.gather(own)  # [ranks, C]
    total = masses.sum(dim=0).masked_fill(~statistics.log_mass.isfinite(), 0)  # NaN or +inf in the row: no id is drawn
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
