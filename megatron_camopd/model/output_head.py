"""The output layer of the last pipeline stage, asked for what is needed instead of for logits.

``GPTModel.forward`` hands its final hidden states to an ``output_processor`` before it would compute logits.
Ours calls the output layer itself (so that the hooks which Megatron's DDP put on that module still fire) with
a :class:`HeadRequest`: which positions matter and what to compute from their hidden states and this rank's
rows of the vocabulary. Hidden states of other positions never meet the output weight, and logits of a whole
microbatch never exist.

Installing the head swaps the class of ``model.output_layer``: parameters, state-dict keys and sharding stay
Megatron's. Called without a request it is Megatron's ``ColumnParallelLinear`` and returns logits.
:class:`~megatron_camopd.model.materialized_head.MaterializedHead` is the same thing done with logits.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_camopd.config.settings import Settings, setting
from megatron_camopd.kernels import distill_head, linear_logprob, sample_ids
from megatron_camopd.model.main_gradient import float32_main_grad, mark_grad_ready


@dataclass(frozen=True, kw_only=True)
class HeadSettings(Settings):
    """CaMOPD output head: log-probabilities and loss from the last hidden states."""

    output_head: Literal["fused", "materialized"] = setting("fused")
    """logits of a few tokens at a time, or all of a microbatch's (to compare)"""


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
    """Log-probabilities (float32 [N]) of ``targets`` [N] at the sampling temperature, and entropies [N].

    On demand also the ``top_k`` most likely ids, the log-probabilities of further ``ids`` [N, K], and ids that
    ``uniforms`` [N, D] draw, with their log-probabilities.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    temperature: float
    valid_vocab_size: int
    top_k: int = 0
    ids: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None

    def compute(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, tp_group: Any, reduce_hidden_grad: bool
    ) -> dict[str, torch.Tensor]:
        head: dict[str, Any] = {
            "temperature": self.temperature, "valid_vocab_size": self.valid_vocab_size, "tp_group": tp_group,
        }  # fmt: skip
        further = 0 if self.ids is None else self.ids.shape[1]
        targets = self.targets if self.ids is None else torch.cat([self.targets[:, None], self.ids], dim=1)
        logprob, entropy, *top = linear_logprob(hidden, weight, targets, top_k=self.top_k, **head)
        answer = {"logprob": logprob, "entropy": entropy}
        if further:
            answer |= {"logprob": logprob[:, 0], "id_logprobs": logprob[:, 1:]}
        if top:
            answer["top_ids"] = top[0]
        if self.uniforms is not None:
            drawn, drawn_logprobs = sample_ids(hidden, weight, self.uniforms, **head)
            answer |= {"drawn_ids": drawn, "drawn_logprobs": drawn_logprobs}
        return answer

    @property
    def plain(self) -> bool:
        """Whether nothing beyond log-probabilities and entropies is asked for."""
        return self.top_k == 0 and self.ids is None and self.uniforms is None


@dataclass
class DistillationLoss:
    """The loss of the trained samples' tokens: -sum_n coefficients_n w_n A_n log pi(target_n).

    ``coefficients`` hold whatever a method gives a sample or a token; ``advantage_floor`` (nats) bounds A_n below.
    ``loss_gradient`` (float32 scalar) is what the returned loss will receive in the backward pass, bit for bit: with
    it known, the head can finish the gradients at once.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    teacher_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    coefficients: torch.Tensor
    advantage_floor: float | None
    importance: tuple[str, float, float]
    temperature: float
    valid_vocab_size: int
    loss_gradient: torch.Tensor

    def compute(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, tp_group: Any, reduce_hidden_grad: bool
    ) -> dict[str, torch.Tensor]:
        buffer = float32_main_grad(weight)
        loss, logprob = distill_head(
            hidden,
            weight,
            self.targets,
            self.teacher_logprobs,
            self.rollout_logprobs,
            self.coefficients,
            importance=self.importance,
            advantage_floor=self.advantage_floor,
            temperature=self.temperature,
            valid_vocab_size=self.valid_vocab_size,
            tp_group=tp_group,
            reduce_hidden_grad=reduce_hidden_grad,
            weight_gradient=buffer,
            loss_gradient=self.loss_gradient,
        )
        return {"loss": loss if buffer is None else mark_grad_ready(loss, weight), "logprob": logprob}


class OutputHead(ColumnParallelLinear):
    """Megatron's output layer that also answers a :class:`HeadRequest`."""

    def forward(self, input_: torch.Tensor, *args: Any, request: HeadRequest | None = None, **kwargs: Any) -> Any:
        if request is None:
            return super().forward(input_, *args, **kwargs)
        return self.answer(request, input_, args[0] if args and args[0] is not None else self.weight)

    def answer(
        self, request: HeadRequest, hidden_states: torch.Tensor, weight: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """``hidden_states`` [S, B, H] ([S/tp, B, H] under sequence parallelism) and ``weight`` [V/tp, H] -> results."""
        hidden = hidden_states
        if self.sequence_parallel:  # [S/tp, B, H] -> [S, B, H]; its backward reduce-scatters the partial sums
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        hidden = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1]).index_select(0, request.positions)
        return request.compute(
            hidden,
            weight,
            tp_group=self.tp_group,
            reduce_hidden_grad=not self.sequence_parallel,
        )


def install_output_head(model: GPTModel, head: type[OutputHead]) -> None:
    """Turn the output layer of a last-stage ``model`` into a ``head``, in place."""
    assert type(model.output_layer) is ColumnParallelLinear, type(model.output_layer)
    model.output_layer.__class__ = head


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
