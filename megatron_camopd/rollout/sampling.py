"""Sampling of one token per row from vocabulary shards, reproducible on every parallel layout.

Gumbel-max: argmax_v (z_v / T + G_v) is a sample of softmax(z / T) when the G_v are independent Gumbel variables.
The noise of each (row, token id) is a hash of (seed, step, index in the global batch, response position, token id), not
a draw from a generator's stream. So every tensor-parallel rank computes the noise of its own columns, no logits are
gathered, and neither the layout nor the other rows of the batch change the noise of a response.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.counter_random import hash_counters, mix, uniform
from megatron_camopd.kernels.products import empty_logits, logits_into
from megatron_camopd.kernels.vocab_parallel import token_chunks

_CHUNK_BYTES = 64 * 2**20  # float32 logits of the rows that are sampled at once; their noise is float64


def gumbel_noise(seed: int, step: int, indices: Tensor, response_positions: Tensor, token_ids: Tensor) -> Tensor:
    """Return the Gumbel noise [n, v] float64 of n rows and v columns.

    Args:
        seed: The run's seed.
        step: Training step.
        indices: [n] int64, the rows' indices in the global batch.
        response_positions: [n] int64, position of the token within its response.
        token_ids: [v] int64, the columns' token ids.
    """
    key = hash_counters(seed, step, indices, response_positions, device=indices.device)
    return uniform(mix(key[:, None] ^ mix(token_ids)[None, :])).log_().neg_().log_().neg_()


def sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: int,
    step: int,
    indices: Tensor,
    response_positions: Tensor,
    temperature: float,
    valid_vocab_size: int,
    tp_group: Any,
) -> tuple[Tensor, Tensor]:
    """Sample the next token of n rows; collective over ``tp_group``, whose ranks all return the same.

    Args:
        hidden: [n, H] hidden states.
        weight: [V/tp, H], this rank's rows of the output matrix.
        seed: The run's seed.
        step: Training step.
        indices: [n] int64, the rows' indices in the global batch.
        response_positions: [n] int64, position of the token within its response.
        temperature: Sampling temperature; 0 takes the most likely token.
        valid_vocab_size: Size of the vocabulary without Megatron's padding, which is never sampled.
        tp_group: Tensor-parallel group.

    Returns:
        Tokens [n] int64 and their log-probabilities [n] float32 under softmax(z / temperature), the distribution that
        they are sampled from; at temperature 0 under softmax(z).
    """
    rank, ranks = dist.get_rank(tp_group), dist.get_world_size(tp_group)
    token_ids = torch.arange(rank * weight.shape[0], (rank + 1) * weight.shape[0], device=hidden.device)
    shard = torch.empty(4, hidden.shape[0], dtype=torch.float64, device=hidden.device)
    size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    workspace = empty_logits(min(size, hidden.shape[0]), weight.shape[0], hidden.device)
    for rows in token_chunks(hidden.shape[0], size):
        logits = logits_into(workspace[: rows.stop - rows.start], hidden[rows], weight).div_(temperature or 1.0)
        logits.masked_fill_(token_ids >= valid_vocab_size, float("-inf"))
        keys = logits.double()
        if temperature > 0:
            keys += gumbel_noise(seed, step, indices[rows], response_positions[rows], token_ids)
        best_key, best = keys.max(dim=-1)
        best_logit = logits.gather(1, best[:, None]).squeeze(1)
        shard[:, rows] = torch.stack(
            [best_key, token_ids[best].double(), best_logit.double(), logits.logsumexp(dim=-1).double()]
        )
    shards = [shard]
    if ranks > 1:
        shards = [torch.empty_like(shard) for _ in range(ranks)]
        dist.all_gather(shards, shard, group=tp_group)
    packed = torch.stack(shards)  # [tp, 4, n]
    winner = packed[:, 0].argmax(dim=0, keepdim=True)  # on a tie the lowest rank, which has the lowest token id
    token = packed[:, 1].gather(0, winner).squeeze(0).long()
    logprob = packed[:, 2].gather(0, winner).squeeze(0) - packed[:, 3].logsumexp(dim=0)
    return token, logprob.float()
