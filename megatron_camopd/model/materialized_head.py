"""The usual output head, as a baseline for the fused one: the logits of the whole micro-batch, and autograd.

Megatron's output layer computes the logits, Megatron's vocabulary-parallel cross entropy the log-probabilities, and
functions of ``megatron_camopd.objective`` the loss. It is slower than the fused head, and needs more memory: the logits
of a micro-batch in the model's dtype, those of its response tokens in float32, and the gradients of both.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_camopd.model.output_head import DistillationLoss, HeadRequest, OutputHead, ScoreTokens
from megatron_camopd.objective import importance_weights, log_prob_gap


class MaterializedHead(OutputHead):
    """Output head that uses logits for plain :class:`ScoreTokens` and :class:`DistillationLoss` requests.

    Every other request is left to the base class.
    """

    def answer(self, request: HeadRequest, hidden_states: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Compute what ``request`` asks for; arguments and result are those of :meth:`OutputHead.answer`."""
        match request:
            case ScoreTokens(plain=True):
                logits = self._logits(request, hidden_states, weight)
                entropy = _entropy(logits, self.tp_group)
                return {"logprob": _logprob(logits, request.targets, self.tp_group), "entropy": entropy}
            case DistillationLoss():
                logits = self._logits(request, hidden_states, weight)
                logprob = _logprob(logits, request.targets, self.tp_group)
                return {"loss": _loss(logprob, request), "logprob": logprob.detach()}
        return super().answer(request, hidden_states, weight)

    def _logits(self, request: ScoreTokens | DistillationLoss, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """Return logits / temperature at the request's positions, [N, V/tp] float32; -inf for padded vocabulary ids."""
        logits, _ = ColumnParallelLinear.forward(self, hidden_states, weight, runtime_gather_output=False)
        logits = logits.transpose(0, 1).flatten(0, 1).index_select(0, request.positions)
        first = dist.get_rank(self.tp_group) * logits.shape[1]
        ids = torch.arange(first, first + logits.shape[1], device=logits.device)
        return (logits.float() / request.temperature).masked_fill(ids >= request.valid_vocab_size, -torch.inf)


def _logprob(logits: Tensor, targets: Tensor, tp_group: Any) -> Tensor:
    """Return the log-probabilities [N] of ``targets`` [N]; overwrites ``logits`` [N, V/tp]."""
    return -vocab_parallel_cross_entropy(logits, targets, tp_group=tp_group)


@torch.no_grad()
def _entropy(logits: Tensor, tp_group: Any) -> Tensor:
    """Return the entropies [N] in nats of softmax(``logits`` [N, V/tp])."""
    top = logits.amax(dim=1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=tp_group)
    exponentials = (logits - top[:, None]).exp_()
    mass = exponentials.sum(dim=1)
    dist.all_reduce(mass, group=tp_group)
    entropy = torch.special.entr(exponentials.div_(mass[:, None])).sum(dim=1)
    dist.all_reduce(entropy, group=tp_group)
    return entropy


def _loss(logprob: Tensor, request: DistillationLoss) -> Tensor:
    """Compute the loss of a :class:`DistillationLoss` request, differentiable in ``logprob`` [N]."""
    strength = request.coefficients * importance_weights(logprob, request.rollout_logprobs, *request.importance)
    dropped = strength == 0.0  # masked, because 0 times an infinite gap would be NaN
    advantage = log_prob_gap(request.teacher_logprobs, logprob)
    if request.advantage_floor is not None:
        advantage = advantage.clamp(min=request.advantage_floor)
    feedback = (strength * advantage).masked_fill(dropped, 0.0)
    return -(feedback * logprob.masked_fill(dropped, 0.0)).sum()
