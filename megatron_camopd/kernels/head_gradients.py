"""Accumulation of the head's two gradients, those of its hidden states and of its weight, chunk by chunk."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels.products import add_weight_gradient, hidden_gradient_into
from megatron_camopd.kernels.vocab_parallel import VocabShard


@dataclasses.dataclass(frozen=True)
class HeadGradients:
    """The inputs of the head and the buffers of their gradients.

    Attributes:
        hidden: [N, H].
        weight: [valid, H], this rank's columns without the phantom ones.
        group: the tensor-parallel group, or None.
        grad_hidden: [N, H] fp32; None if no gradient is wanted.
        grad_weight: [valid, H] fp32; None if no gradient is wanted.
    """

    hidden: Tensor
    weight: Tensor
    group: dist.ProcessGroup | None
    grad_hidden: Tensor | None
    grad_weight: Tensor | None

    @staticmethod
    def allocate(
        hidden: Tensor, weight: Tensor, shard: VocabShard, wants_hidden: bool, grad_weight: Tensor | None
    ) -> "HeadGradients":
        """Allocate the gradient of ``hidden`` [N, H] if wanted, and take the caller's buffer for that of ``weight``.

        Both ``weight`` and ``grad_weight`` (fp32, or None) are [V, H]; their phantom columns are left out.
        """
        return HeadGradients(
            hidden,
            weight[: shard.valid],
            shard.group,
            torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None,
            None if grad_weight is None else grad_weight[: shard.valid],
        )

    @property
    def wanted(self) -> bool:
        """Whether any gradient is wanted."""
        return self.grad_hidden is not None or self.grad_weight is not None

    def add(self, rows: slice, grad_logits: Tensor, idle: Tensor) -> None:
        """Add the gradients that come from one chunk of tokens.

        Args:
            rows: the chunk's C tokens.
            grad_logits: [C, valid], gradient of the loss with respect to the chunk's logits.
            idle: [C] bool, tokens whose gradient is 0.
        """
        if self.grad_hidden is not None:
            hidden_gradient_into(self.grad_hidden[rows], grad_logits, self.weight)
        if self.grad_weight is not None:
            inputs = self.hidden[rows].masked_fill(idle[:, None], 0.0)  # 0 * NaN would make every entry NaN
            add_weight_gradient(self.grad_weight, grad_logits, inputs)

    def finished_hidden(self, reduce: bool) -> Tensor | None:
        """Return the gradient of the hidden states, summed over the group if ``reduce``; None if not wanted."""
        if self.grad_hidden is not None and reduce and self.group is not None:
            dist.all_reduce(self.grad_hidden, group=self.group)
        return self.grad_hidden
