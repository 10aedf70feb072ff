"""The output layer of the last pipeline stage, asked for what is needed instead of for logits.

``GPTModel.forward`` hands its final hidden states to an ``output_processor`` before it would compute logits.
Ours calls the output layer itself (so that the hooks which Megatron's DDP put on that module still fire) with
a :class:`HeadRequest`: which positions matter and what to compute from their hidden states and this rank's
rows of the vocabulary. Hidden states of other positions never meet the output weight, and logits of a whole
microbatch never exist.

Installing the head swaps the class of ``model.output_layer``: parameters, state-dict keys and sharding stay
Megatron's. Called without a request it is Megatron's ``ColumnParallelLinear`` and returns logits.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_camopd.kernels import distill_head, linear_logprob


class HeadRequest(Protocol):
    """What a forward pass wants from the last stage.

    ``positions`` [N] int64 indexes the flattened [batch, sequence] grid of the microbatch.
    """

    positions: torch.Tensor

    def compute(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, tp_group: Any, reduce_hidden_grad: bool
    ) -> dict[str, torch.Tensor]:
        """``hidden`` [N, H] and this rank's ``weight`` [V/tp, H] -> named results."""
        ...


@dataclass
class ScoreTokens:
    """Log-probabilities (float32 [N]) of ``targets`` [N] at the sampling temperature, and entropies [N]."""

    positions: torch.Tensor
    targets: torch.Tensor
    temperature: float
    valid_vocab_size: int

    def compute(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, tp_group: Any, reduce_hidden_grad: bool
    ) -> dict[str, torch.Tensor]:
        logprob, entropy = linear_logprob(
            hidden,
            weight,
            self.targets,
            temperature=self.temperature,
            valid_vocab_size=self.valid_vocab_size,
            tp_group=tp_group,
        )
        return {"logprob": logprob, "entropy": entropy}


@dataclass
class DistillationLoss:
    """The loss of the selected samples' tokens: -sum_n coefficients_n w_n A_n log pi(target_n) (paper, Eq. 9)."""

    positions: torch.Tensor
    targets: torch.Tensor
    teacher_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    coefficients: torch.Tensor
    importance: tuple[str, float, float]
    temperature: float
    valid_vocab_size: int

    def compute(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, tp_group: Any, reduce_hidden_grad: bool
    ) -> dict[str, torch.Tensor]:
        loss, logprob = distill_head(
            hidden,
            weight,
            self.targets,
            self.teacher_logprobs,
            self.rollout_logprobs,
            self.coefficients,
            importance=self.importance,
            temperature=self.temperature,
            valid_vocab_size=self.valid_vocab_size,
            tp_group=tp_group,
            reduce_hidden_grad=reduce_hidden_grad,
        )
        return {"loss": loss, "logprob": logprob}


class OutputHead(ColumnParallelLinear):
    """Megatron's output layer that also answers a :class:`HeadRequest`."""

    def forward(self, input_: torch.Tensor, *args: Any, request: HeadRequest | None = None, **kwargs: Any) -> Any:
        if request is None:
            return super().forward(input_, *args, **kwargs)
        weight = args[0] if args and args[0] is not None else self.weight
        hidden = input_
        if self.sequence_parallel:  # [S/tp, B, H] -> [S, B, H]; its backward reduce-scatters the partial sums
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        hidden = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1]).index_select(0, request.positions)
        return request.compute(
            hidden,
            weight,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            reduce_hidden_grad=not self.sequence_parallel,
        )


def install_output_head(model: GPTModel) -> None:
    """Turn the output layer of a last-stage ``model`` into an :class:`OutputHead`, in place."""
    assert type(model.output_layer) is ColumnParallelLinear, type(model.output_layer)
    model.output_layer.__class__ = OutputHead


def answer_request(
    *,
    hidden_states: torch.Tensor,
    output_layer: OutputHead,
    output_weight: torch.Tensor | None,
    context: HeadRequest,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """The ``output_processor`` for ``GPTModel.forward``; the request travels as its context."""
    return output_layer(hidden_states, output_weight, request=context)
