"""Where the two gradients of the head gather, chunk by chunk: of its hidden states and of its weight."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels.products import add_weight_gradient, hidden_gradient_into
from megatron_camopd.kernels.vocab_parallel import VocabShard


@dataclasses.dataclass(frozen=True)
class HeadGradients:
    """hidden [N, H], weight [valid, H]; grad_hidden [N, H] and grad_weight [valid, H] fp32, None: not wanted."""

    hidden: Tensor
    weight: Tensor
    group: dist.ProcessGroup | None
    grad_hidden: Tensor | None
    grad_weight: Tensor | None

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, shard: VocabShard, wants_hidden: bool, grad_weight: Tensor | None
    ) -> "HeadGradients":
        """For ``weight`` [V, H] and the buffer ``grad_weight`` [V, H] fp32 that its gradient is added to."""
        return HeadGradients(
            hidden,
            weight[: shard.valid],
            shard.group,
            torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None,
            None if grad_weight is None else grad_weight[: shard.valid],
        )

    @property
    def wanted(self) -> bool:
        return self.grad_hidden is not None or self.grad_weight is not None

    def add(self, rows: slice, grad_logits: Tensor, idle: Tensor) -> None:
        """The share of the tokens ``rows`` from grad_logits [C, valid], which is 0 in the rows ``idle`` [C] bool."""
        if self.grad_hidden is not None:
            hidden_gradient_into(self.grad_hidden[rows], grad_logits, self.weight)
        if self.grad_weight is not None:
            inputs = self.hidden[rows].masked_fill(idle[:, None], 0.0)  # 0 * NaN would spoil the whole weight
            add_weight_gradient(self.grad_weight, grad_logits, inputs)

    def finished_hidden(self, reduce: bool) -> Tensor | None:
        """The gradient of the hidden states, with ``reduce`` summed over the group."""
        if self.grad_hidden is not None and reduce and self.group is not None:
            dist.all_reduce(self.grad_hidden, group=self.group)
        return self.grad_hidden
