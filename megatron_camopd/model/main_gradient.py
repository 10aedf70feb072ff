"""The output weight's gradient, added to Megatron's ``main_grad`` before the backward pass begins.

The distillation head knows d loss / d weight as soon as it has computed the loss. Where Megatron's DDP keeps a float32
``main_grad``, the head adds to it at once, as the fused weight gradients of Megatron's own layers do in their backward
pass. So no gradient of the weight's size is stored until the backward pass, and each micro-batch's contribution is
rounded once instead of twice.
"""

from typing import Any

import torch
from torch import Tensor


def float32_main_grad(weight: Tensor) -> Tensor | None:
    """Return ``weight.main_grad`` if a gradient is wanted and that buffer is float32, else None.

    None means that the gradient is left to autograd. Teachers have no buffer, because they run without Megatron's DDP;
    ``--grad-reduce-in-bf16`` makes it a bfloat16 one.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    buffer = getattr(weight, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == torch.float32 else None


def mark_grad_ready(loss: Tensor, weight: Tensor) -> Tensor:
    """Return ``loss`` such that its backward pass tells DDP that ``weight.main_grad`` holds the gradient.

    DDP marks a parameter as ready (and with ``--overlap-grad-reduce`` starts reducing its bucket) in a hook that
    autograd runs when it delivers the parameter's gradient. So the backward pass must deliver one, and DDP must not add
    it again. A weight tied to the embedding of the same stage (``zero_out_wgrad``) needs no mark: the embedding
    delivers its gradient, and DDP has to add that one.
    """
    if getattr(weight, "zero_out_wgrad", False):
        return loss
    return _MarkGradReady.apply(loss, weight)


class _MarkGradReady(torch.autograd.Function):
    """Identity of the loss whose backward pass delivers a placeholder gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return loss.clone()  # Megatron's schedule divides the loss in place, which autograd forbids for a view

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        # Megatron's linear layers use the same convention: this flag, and a placeholder with arbitrary contents.
        ctx.weight.grad_added_to_main_grad = True
        return grad_outputs[0], torch.empty_like(ctx.weight)
