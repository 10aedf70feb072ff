"""Supervised training and evaluation passes over packed conversations.

    L = -(1/T) sum_n log pi(y_n | conversation before y_n),   over the T assistant tokens of the global batch

The loss goes through the same output head as distillation: cross entropy is that loss with every advantage 1.
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
    """Run forward and backward over this data-parallel rank's ``rows``; return the global loss (nats per token).

    The gradients are left in Megatron's buffers, summed over micro-batches and data-parallel ranks. Collective.

    Args:
        settings: Settings of the passes.
        model: The model chunks.
        rows: Packed rows; every data-parallel rank must have the same number.
        trained_tokens: T, the assistant tokens of all data-parallel ranks together.
    """
    for chunk in model:
        chunk.train()
    microbatches = _microbatches(settings, rows)
    # As in distillation: Megatron's schedule divides by the number of micro-batches, DDP by the number of ranks.
    undo_averaging = len(microbatches) * Layout.current().data.size
    gradient = loss_gradient(model, len(microbatches))
    items = [(part, _cross_entropy(settings, part, undo_averaging / trained_tokens, gradient)) for part in microbatches]
    answers = run_schedule(settings, model, items, forward_only=False)
    return _total(sum(float(answer["loss"]) for answer in answers) / undo_averaging)


@torch.no_grad()
def cross_entropy(settings: PassSettings, model: Sequence[MegatronModule], rows: Sequence[PackedRow]) -> float:
    """Sum -log pi (nats) over the assistant tokens of all ranks' ``rows``; ranks may have different numbers of rows."""
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
    """Make the micro-batches of ``rows``."""
    return pack_microbatches(
        rows,
        size=settings.micro_batch_size,
        length_multiple=settings.length_multiple,
        device=accelerator.current().device,
        transformer_impl=settings.transformer_impl,
    )


def _cross_entropy(settings: PassSettings, part: Microbatch, coefficient: float, gradient: Tensor) -> DistillationLoss:
    """Request -``coefficient`` sum_n log pi(y_n): gaps of -inf with an advantage floor of 1 make every advantage 1."""
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
    """Sum the last pipeline stage's ``value`` over the data-parallel ranks; every rank returns the sum."""
    layout = Layout.current()
    totals = sum_over({"value": value if layout.last_stage else 0.0}, layout.data.group)
    return sum_over(totals, layout.pipeline.group)["value"]
