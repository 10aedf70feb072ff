"""The output head fused with what is wanted of it: log-probabilities, or loss and gradients, never the logits.

One operation per file; each splits its tokens into chunks, so that logits exist for one chunk at a time, and its
vocabulary over a tensor-parallel group as Megatron shards its output layer. Only torch is needed.
"""

from megatron_camopd.kernels.distill_head import distill_head
from megatron_camopd.kernels.linear_logprob import linear_logprob

__all__ = ["distill_head", "linear_logprob"]
