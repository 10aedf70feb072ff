"""The output head fused with what follows it, so that the logits of a batch never exist all at once.

One operation per file: ``linear_logprob`` (log-probabilities and entropy), ``distill_head`` (the distillation loss and
its gradients), ``sample_ids`` (random vocabulary ids). Each works on one chunk of tokens at a time and takes a weight
that is sharded over the vocabulary as Megatron shards its output layer. Matrix products are torch's (``products``).
Operations on rows of logits (``row_operations``) have two back ends: Triton on CUDA, torch elsewhere.

Throughout this package, a row is the logits of one token, a column is one vocabulary id, and a part of a row is the
range of columns that one rank or one tile holds.
"""

from megatron_camopd.kernels.distill_head import TokenMetrics, distill_head
from megatron_camopd.kernels.linear_logprob import linear_logprob
from megatron_camopd.kernels.sample_ids import sample_ids

__all__ = ["TokenMetrics", "distill_head", "linear_logprob", "sample_ids"]
