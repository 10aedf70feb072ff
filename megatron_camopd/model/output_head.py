"""The output layer of the last pipeline stage, which computes log-probabilities or the loss instead of logits.

``GPTModel.forward`` passes its final hidden states to an ``output_processor`` instead of computing logits, if it is
given one. Ours (:func:`answer_request`) calls the output layer with a :class:`HeadRequest`, which says what to compute,
and at which positions. It calls the module itself, so that the hooks of Megatron's DDP on that module still fire. Only
the hidden states at those positions are multiplied by the output weight, and the logits of a whole micro-batch never
exist.

Installing the head replaces the class of ``model.output_layer``: parameters, state-dict keys and sharding stay
Megatron's. Called without a request, it behaves as Megatron's ``ColumnParallelLinear`` and returns logits.
:class:`~megatron_camopd.model.materialized_head.MaterializedHead` computes the same results from logits.
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
    """logits of a few tokens at a time (fused), or of a whole micro-batch, as a baseline"""


class HeadRequest(Protocol):
    """Request of a forward pass to the output head of the last pipeline stage."""

    positions: torch.Tensor
    """[N] int64 positions in the micro-batch, flattened batch first"""

    def compute(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, tp_group: Any, reduce_hidden_grad: bool
    ) -> dict[str, torch.Tensor]:
        """Compute the named results.

        Args:
            hidden: [N, H] hidden states at ``positions``.
            weight: [V/tp, H] this rank's shard of the output weight.
            tp_group: Tensor-parallel group, over which the vocabulary is sharded.
            reduce_hidden_grad: Whether to sum the gradient of ``hidden`` over ``tp_group``; without it, each rank
                returns the part that comes from its own shard.
        """
        ...


@dataclass
class ScoreTokens:
    """Request for the log-probabilities of ``targets`` and the entropies, both [N] float32 in nats.

    Probabilities are those of softmax(logits / temperature) over the first ``valid_vocab_size`` ids.

    Attributes:
        positions: [N] int64, as in :class:`HeadRequest`.
        targets: [N] int64 ids of the predicted tokens.
        temperature: Sampling temperature.
        valid_vocab_size: Size of the vocabulary without padding.
        top_k: Number of most likely ids to return as well ([N, top_k]).
        ids: [N, K] int64 further ids whose log-probabilities are wanted, or None.
        uniforms: [N, D] float64 numbers in [0, 1), each of which draws an id, or None; the ids are returned with their
            log-probabilities.
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
        """Return ``logprob`` and ``entropy``, and where wanted ``top_ids``, ``id_logprobs`` and ``drawn_*``."""
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
        """Whether the request is for log-probabilities and entropies alone."""
        return self.top_k == 0 and self.ids is None and self.uniforms is None


@dataclass
class DistillationLoss:
    """Request for the distillation loss: -sum_n coefficients_n w_n A_n log pi(target_n) over the N trained tokens.

    w_n is the importance weight and A_n = max(teacher - student log-probability, ``advantage_floor``); both are
    constants of the backward pass.

    Attributes:
        positions: [N] int64, as in :class:`HeadRequest`.
        targets: [N] int64 ids of the trained tokens.
        teacher_logprobs: [N] float32, nats.
        rollout_logprobs: [N] float32, nats: log-probabilities under the engine that sampled.
        coefficients: [N] float32: weight of each token's loss, as the method computes it.
        advantage_floor: Lower bound of A_n in nats, or None.
        importance: Mode and bounds of the importance weights.
        temperature: Sampling temperature; log pi is that of softmax(logits / temperature).
        valid_vocab_size: Size of the vocabulary without padding.
        loss_gradient: Float32 scalar: the gradient that the loss will receive in the backward pass, bit for bit. Since
            it is known, the head computes the gradients of hidden states and weight together with the loss.
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
        """Return ``loss`` (scalar) and ``logprob`` [N]; adds the weight's gradient to a float32 ``main_grad``."""
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
    """Megatron's output layer that can also answer a :class:`HeadRequest`."""

    def forward(self, input_: torch.Tensor, *args: Any, request: HeadRequest | None = None, **kwargs: Any) -> Any:
        """Return the results of ``request``; without one, logits as Megatron's layer does."""
        if request is None:
            return super().forward(input_, *args, **kwargs)
        return self.answer(request, input_, args[0] if args and args[0] is not None else self.weight)

    def answer(
        self, request: HeadRequest, hidden_states: torch.Tensor, weight: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute what ``request`` asks for.

        Args:
            request: What to compute, and at which positions.
            hidden_states: [S, B, H], or [S/tp, B, H] under sequence parallelism.
            weight: [V/tp, H] this rank's shard of the output weight.
        """
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
    """Replace the class of the output layer of ``model`` (a last pipeline stage) by ``head``, in place."""
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
    """Answer the request ``context``; this is the ``output_processor`` that ``GPTModel.forward`` calls."""
    result: dict[str, Any] = output_layer(hidden_states, output_weight, request=context)
    return result
