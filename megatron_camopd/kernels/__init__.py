"""The output head fused with what is wanted of it: log-probabilities, or loss and gradients, never the logits.

One operation per file: ``linear_logprob``, ``distill_head``, ``sample_ids``. Each splits its tokens into chunks, so
that logits exist for one chunk at a time, and its vocabulary over a tensor-parallel group as Megatron shards its output
layer. Products are torch's (``products``); what happens to a row of logits has two back ends behind ``rows``: Triton on
CUDA, torch elsewhere.
"""

from megatron_camopd.kernels.distill_head import TokenMetrics, distill_head
from megatron_camopd.kernels.linear_logprob import linear_logprob
from megatron_camopd.kernels.sample_ids import sample_ids

__all__ = ["TokenMetrics", "distill_head", "linear_logprob", "sample_ids"]
