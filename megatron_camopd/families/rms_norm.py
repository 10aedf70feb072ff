"""RMSNorm for Megatron's local layers that works under sequence parallelism.

Megatron's own norm for local layers (``WrappedTorchNorm``) refuses sequence parallelism. A plain ``torch.nn.RMSNorm``
does not set ``sequence_parallel`` on its weight; ``finalize_model_grads`` would then leave each tensor-parallel rank
with the gradient of its own part of the sequence only.
"""

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """``y = weight * x / sqrt(mean(x^2) + eps)``, computed in float32 as Hugging Face's models do.

    ``weight`` [hidden_size] has the attribute ``sequence_parallel``, by which Megatron sums its gradient over the
    tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise ``hidden`` over its last dimension."""
        scaled = hidden.float()
        scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(hidden.dtype)
