"""Log-probabilities of given tokens and the entropy, straight from hidden states and the output weight.

    z_n = W x_n / T;   logprob_{n,k} = z_{n, y_{n,k}} - log sum_v e^{z_{n,v}};   entropy_n = - sum_v p_{n,v} log p_{n,v}

Choice made: logits live for one chunk of tokens at a time, and the backward pass computes them again (4 matrix products
in all instead of 3, but the upstream gradient need not be known in advance). Where it is known - in training -
``distill_head`` saves that product. Tensor contract and vocabulary shards: see ``kernels.vocab_parallel``.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels.vocab_parallel import (
    VocabShard,
    add_weight_gradient,
    check_head_inputs,
    chunk_logits,
    hidden_gradient,
    row_statistics,
    token_chunks,
)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        shard: VocabShard,
        chunk_tokens: int | None,
        reduce_hidden_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logprob = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        entropy, top, log_mass = logprob.new_empty(3, hidden.shape[0]).unbind(0)
        for rows in token_chunks(hidden.shape[0], shard.width, chunk_tokens):
            logits = chunk_logits(hidden[rows], weight[: shard.valid]).div_(temperature)
            statistics, _ = row_statistics(logits, targets[rows], shard)
            logprob[rows], entropy[rows] = statistics.logprob, statistics.entropy
            top[rows], log_mass[rows] = statistics.top, statistics.log_mass
        ctx.save_for_backward(hidden, weight, targets, top, log_mass)
        ctx.settings = (temperature, shard, chunk_tokens, reduce_hidden_grad)
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprob = grad_outputs[0]
        if grad_logprob is None:
            return (None,) * 7
        hidden, weight, targets, top, log_mass = ctx.saved_tensors
        temperature, shard, chunk_tokens, reduce_hidden_grad = ctx.settings
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        real = weight[: shard.valid]
        for rows in token_chunks(hidden.shape[0] if shard.valid else 0, shard.width, chunk_tokens):
            grad = grad_logprob[rows].float() / temperature
            logits = chunk_logits(hidden[rows], real).div_(temperature)
            grad_logits = logits.sub_(top[rows, None]).sub_(log_mass[rows, None]).exp_()
            grad_logits.mul_(-grad.sum(dim=1, keepdim=True))
            columns, owned = shard.local(targets[rows])
            # One target at a time: a token named twice in a row would make a joint scatter depend on the order.
            for kind in range(targets.shape[1]):
                one = slice(kind, kind + 1)
                grad_logits.scatter_add_(1, columns[:, one], grad[:, one].masked_fill(~owned[:, one], 0.0))
            if grad_hidden is not None:
                grad_hidden[rows] = hidden_gradient(grad_logits, real)
            if grad_weight is not None:
                add_weight_gradient(grad_weight[: shard.valid], grad_logits, hidden[rows])
        if grad_hidden is not None:
            if reduce_hidden_grad and shard.group is not None:
                dist.all_reduce(grad_hidden, group=shard.group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row under softmax(hidden weight^T / temperature).

    hidden: [N, H] float (bf16, fp16, fp32), the same on every rank of ``tp_group``; N may be 0.
    weight: [V, H] float, this rank's V columns of the padded vocabulary (all of them without ``tp_group``).
    targets: [N] or [N, K] int64 vocabulary ids; a phantom or out-of-range id has log-probability -inf.
    temperature: divides the logits. valid_vocab_size: real size of the vocabulary, columns from there on are phantom;
    None: no phantom columns. chunk_tokens: tokens whose logits exist at a time; None: about 64 MB of them.
    reduce_hidden_grad: True sums the gradient to ``hidden`` over the group; False leaves this rank's part, for a caller
    that reduces (and scatters) itself.

    Returns (logprob fp32 shaped like ``targets``, entropy [N] fp32), nats, the same on every rank. Differentiable in
    ``hidden`` and ``weight`` through logprob alone; the upstream gradient must be the same on every rank. Gradients sum
    in fp32 and come back in their input's dtype. Raises ValueError for shapes or settings that do not fit.
    """
    check_head_inputs(hidden, weight, temperature, chunk_tokens)
    if targets.dim() not in (1, 2) or targets.shape[0] != hidden.shape[0]:
        raise ValueError(f"targets {tuple(targets.shape)} is neither [N] nor [N, K] with N = {hidden.shape[0]}")
    shard = VocabShard.of(weight, valid_vocab_size, tp_group)
    columns = targets[:, None] if targets.dim() == 1 else targets
    logprob, entropy = _LinearLogprob.apply(
        hidden, weight, columns, temperature, shard, chunk_tokens, reduce_hidden_grad
    )
    return logprob.view(targets.shape), entropy
