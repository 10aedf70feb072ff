"""The output weight's gradient, added to Megatron's ``main_grad`` before the backward pass begins.

The distillation head knows d loss / d weight as soon as it has computed the loss. Where Megatron's DDP keeps a float32
``main_grad``, the head adds to it at once, as fused weight gradients of Megatron's own layers do in their backward
pass: no gradient of the weight's size waits in between, and sums of many microbatches round once instead of twice.
"""

from typing import Any

import torch
from torch import Tensor


def float32_main_grad(weight: Tensor) -> Tensor | None:
    """``weight.main_grad`` where a gradient is wanted and that buffer is float32, else None: leave it to autograd.

    There is none without Megatron's DDP (teachers), and a bfloat16 one with ``--grad-reduce-in-bf16``.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    buffer = getattr(weight, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == torch.float32 else None


def mark_grad_ready(loss: Tensor, weight: Tensor) -> Tensor:
    """``loss``, whose backward pass tells DDP that the gradient of ``weight`` is in its ``main_grad``.

    DDP counts a parameter as ready, and with --overlap-grad-reduce starts reducing its bucket, in a hook that autograd
    runs where it delivers the parameter's gradient; a gradient must therefore be delivered, and not be added again. A
    weight tied to the embedding of the same stage (``zero_out_wgrad``) gets one anyway, the embedding's, and that one
    is to be added.
    """
    if getattr(weight, "zero_out_wgrad", False):
        return loss
    return _MarkGradReady.apply(loss, weight)


class _MarkGradReady(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return loss.clone()  # the schedule divides the loss in place, which a view would refuse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        # The flag and the placeholder without contents are the convention of Megatron's linear layers.
        ctx.weight.grad_added_to_main_grad = True
        return grad_outputs[0], torch.empty_like(ctx.weight)
