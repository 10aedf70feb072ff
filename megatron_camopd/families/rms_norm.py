"""RMSNorm for Megatron's local layers that supports sequence parallelism.

Megatron's own norm for local layers (``WrappedTorchNorm``) refuses sequence parallelism. A plain ``torch.nn.RMSNorm``
lacks the attribute ``sequence_parallel`` of its weight, without which ``finalize_model_grads`` would leave each
tensor-parallel rank with the gradient of only its own part of the sequence.
"""

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """RMSNorm, y = weight * x / sqrt(mean(x^2) + eps), computed in float32 as in Hugging Face's models.

    Input and output are [..., hidden_size] of the model's dtype. ``weight`` [hidden_size] carries
    ``sequence_parallel`` so that Megatron sums its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise ``hidden`` [..., hidden_size] over its last dimension."""
        scaled = hidden.float()
        scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + self.eps)
        # The embedding's transpose to [T, 1, H] leaves the dimension of one row with a stride of T H. That counts as
        # contiguous, but torch.matmul by a frozen weight then goes token by token: slower, and other bits than by the
        # student's weight. The view has the usual strides.
        return (self.weight * scaled.to(hidden.dtype)).flatten(0, -2).view(hidden.shape)
