"""Supervised training and evaluation passes over packed conversations.

    L = -(1/T) sum_n log pi(y_n | conversation before it),   T assistant tokens of the whole global batch

The loss goes through the same output head as distillation: cross entropy is its loss with every advantage 1.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_camopd.data import PackedRow
from megatron_camopd.model.microbatch import Microbatch
from megatron_camopd.model.output_head import DistillationLoss, ScoreTokens
from megatron_camopd.model.packed import pack_microbatches
from megatron_camopd.model.passes import PassSettings, loss_gradient, run_schedule
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.collectives import sum_over
from megatron_camopd.runtime.layout import Layout


def accumulate_cross_entropy(
    settings: PassSettings, model: Sequence[MegatronModule], rows: Sequence[PackedRow], trained_tokens: int
) -> float:
    """Forward and backward over this data-parallel rank's ``rows``; returns the global loss (nats per token).

    ``trained_tokens``: T, of all ranks together. Every rank brings the same number of rows. Gradients are left in
    Megatron's buffers, summed over microbatches and ranks. Collective.
    """
    for chunk in model:
        chunk.train()
    microbatches = _microbatches(settings, rows)
    # As in distillation: the schedule divides by the number of microbatches and DDP averages over the ranks.
    undo_averaging = len(microbatches) * Layout.current().data.size
    gradient = loss_gradient(model, len(microbatches))
    items = [(part, _cross_entropy(settings, part, undo_averaging / trained_tokens, gradient)) for part in microbatches]
    answers = run_schedule(settings, model, items, forward_only=False)
    return _total(sum(float(answer["loss"]) for answer in answers) / undo_averaging)


@torch.no_grad()
def cross_entropy(settings: PassSettings, model: Sequence[MegatronModule], rows: Sequence[PackedRow]) -> float:
    """Sum of -log pi over the assistant tokens of all ranks' ``rows`` (nats); ranks may bring different numbers."""
    for chunk in model:
        chunk.eval()
    total = 0.0
    if rows:
        items = [
            (part, ScoreTokens(part.positions, part.targets, temperature=1.0, valid_vocab_size=settings.vocab_size))
            for part in _microbatches(settings, rows)
        ]
        answers = run_schedule(settings, model, items, forward_only=True)
        total = -sum(float(answer["logprob"].double().sum()) for _, answer in answers)
    return _total(total)


def _microbatches(settings: PassSettings, rows: Sequence[PackedRow]) -> list[Microbatch]:
    return pack_microbatches(
        rows,
        size=settings.micro_batch_size,
        length_multiple=settings.length_multiple,
        device=accelerator.current().device,
        transformer_impl=settings.transformer_impl,
    )


def _cross_entropy(settings: PassSettings, part: Microbatch, coefficient: float, gradient: Tensor) -> DistillationLoss:
    """-``coefficient`` sum_n log pi(y_n): a floor of 1 under a gap of -inf makes every advantage 1."""
    like = {"size": (len(part.targets),), "device": part.targets.device}
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


def _total(value: float) -> float:
    """The sum over data-parallel ranks of what the last pipeline stage has, on every rank."""
    layout = Layout.current()
    totals = sum_over({"value": value if layout.last_stage else 0.0}, layout.data.group)
    return sum_over(totals, layout.pipeline.group)["value"]
