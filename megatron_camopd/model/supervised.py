"""Supervised training and evaluation passes over packed conversations.

    L = -(1/T) sum_n log pi(y_n | conversation before y_n),   over the T assistant tokens of the global batch

The loss goes through the same output head as distillation: cross entropy is that loss with every advantage 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_camopd.data import EncodedConversation
from megatron_camopd.model.microbatch import Microbatch, Piece
from megatron_camopd.model.output_head import DistillationLoss, ScoreTokens
from megatron_camopd.model.packing import imbalance
from megatron_camopd.model.passes import PassSettings, TrainedPass, accumulate, run_schedule, total
from megatron_camopd.runtime.layout import Layout


def accumulate_cross_entropy(
    settings: PassSettings,
    model: Sequence[MegatronModule],
    conversations: Sequence[EncodedConversation],
    trained_tokens: int,
) -> TrainedPass:
    """Run forward and backward over the conversations of the global batch; the loss is in nats per trained token.

    The gradients are left in Megatron's buffers, summed over micro-batches, data- and context-parallel ranks.
    Collective.

    Args:
        settings: Settings of the passes.
        model: The model chunks.
        conversations: The conversations of the global batch, the same on every rank.
        trained_tokens: T, the assistant tokens of all of them.
    """

    def request(part: Microbatch, factor: float, gradient: Tensor) -> DistillationLoss:
        return _cross_entropy(settings, part, factor / trained_tokens, gradient)

    pieces, balance = _share(settings, conversations)
    loss, tokens = accumulate(settings, model, pieces, request)
    return TrainedPass(loss, tokens, balance)


@torch.no_grad()
def cross_entropy(
    settings: PassSettings, model: Sequence[MegatronModule], conversations: Sequence[EncodedConversation]
) -> float:
    """Sum -log pi (nats) over the assistant tokens of ``conversations``, the same on every rank; collective."""
    for chunk in model:
        chunk.eval()
    pieces, _ = _share(settings, conversations)
    items = [
        (part, ScoreTokens(part.positions, part.targets, temperature=1.0, valid_vocab_size=settings.vocab_size))
        for part in settings.microbatches(pieces)
    ]
    answers = run_schedule(model, items, forward_only=True)
    return total(-sum(float(answer["logprob"].double().sum()) for _, answer in answers))


def _share(settings: PassSettings, conversations: Sequence[EncodedConversation]) -> tuple[list[Piece], float]:
    """Return this data-parallel rank's conversations, and the tokens of the rank with the most over the mean."""
    lengths = [len(conversation) for conversation in conversations]
    shares = settings.shares(lengths)
    own = shares[Layout.current().data.rank]
    return [_piece(place, conversations[place]) for place in own], imbalance(shares, lengths)


def _piece(number: int, conversation: EncodedConversation) -> Piece:
    """Return a conversation as a sequence of a micro-batch; no token predicts its first one."""
    places = [place for place, trained in enumerate(conversation.trained) if trained and place]
    wanted = torch.tensor(places, dtype=torch.int64)
    return Piece(torch.tensor(conversation.token_ids), wanted, number, wanted)


def _cross_entropy(settings: PassSettings, part: Microbatch, coefficient: float, gradient: Tensor) -> DistillationLoss:
    """Request -``coefficient`` sum_n log pi(y_n): gaps of -inf with an advantage floor of 1 make every advantage 1."""
    like: dict[str, Any] = {"size": (len(part.targets),), "device": part.targets.device}
    return DistillationLoss(
        positions=part.positions,
        targets=part.targets,
        teacher_logprobs=torch.full(fill_value=-torch.inf, **like),
        rollout_logprobs=torch.full(fill_value=0.0, **like),
        coefficients=torch.full(fill_value=coefficient, **like),
        advantage_floor=1.0,
        importance=("none", 0.0, 0.0),
        temperature=1.0,
        valid_vocab_size=settings.vocab_size,
        loss_gradient=gradient,
    )
