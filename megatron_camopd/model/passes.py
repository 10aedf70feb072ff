"""The two passes of a step through Megatron's pipeline schedule: scoring (forward only) and training.

Both run micro-batches through Megatron's ``forward_backward_func``, each with a request to the last stage's output
head. Teacher and student are scored by the same code, so that their gap never contains a difference between two
implementations.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest, TokenScores
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.model.microbatch import Microbatch, groups_by_length, make_microbatches, share_of_selection
from megatron_camopd.model.output_head import DistillationLoss, HeadRequest, ScoreTokens, answer_request
from megatron_camopd.objective.importance import ImportanceSettings
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.collectives import broadcast_rows, sum_over
from megatron_camopd.runtime.layout import Layout

WorkItem = tuple[Microbatch, HeadRequest]


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """Settings of the scoring and training passes, the same for a whole run.

    Attributes:
        micro_batch_size: Largest number of rows in a micro-batch.
        seq_length: Tokens of the longest sequence, padding included.
        length_multiple: Sequences are padded to a multiple of this (the tensor-parallel size under sequence
            parallelism, which splits them evenly over the ranks).
        vocab_size: Size of the vocabulary without padding.
        transformer_impl: Megatron's layers: "local" or "transformer_engine".
        temperature: Sampling temperature: log-probabilities are those of softmax(logits / temperature).
        importance: Mode and bounds of the importance weights.
    """

    micro_batch_size: int
    seq_length: int
    length_multiple: int
    vocab_size: int
    transformer_impl: str
    temperature: float
    importance: tuple[str, float, float]

    @staticmethod
    def of(args: Namespace) -> "PassSettings":
        """Read the settings from checked arguments."""
        return PassSettings(
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            length_multiple=args.tensor_model_parallel_size if args.sequence_parallel else 1,
            vocab_size=args.vocab_size,
            transformer_impl=args.transformer_impl,
            temperature=SamplingSettings.of(args).rollout_temperature,
            importance=ImportanceSettings.of(args).weights,
        )


def forward_step(items: Iterator[WorkItem], model: MegatronModule) -> tuple[Any, Any]:
    """Run one micro-batch: Megatron's forward step function, which returns the output and a function of it."""
    microbatch, request = next(items)
    output = model(
        microbatch.tokens,
        microbatch.position_ids,
        output_processor=answer_request,
        output_processor_context=request,
        **({"attention_mask": None} | microbatch.attention),
    )
    return output, partial(_read_loss, microbatch)


def _read_loss(microbatch: Microbatch, output: dict[str, Tensor], non_loss_data: bool = False) -> Any:
    """Return the loss and what to report (training), or the micro-batch with the head's results (scoring)."""
    if non_loss_data:
        return microbatch, output
    # A copy, because Megatron's schedule divides the loss in place by the number of micro-batches.
    return output["loss"], {"loss": output["loss"].detach().clone(), "logprob": output["logprob"]}


def run_schedule(
    settings: PassSettings, model: Sequence[MegatronModule], items: Sequence[WorkItem], *, forward_only: bool
) -> list[Any]:
    """Run Megatron's schedule over ``items``; returns :func:`_read_loss` of each on the last stage, else []."""
    result: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(items),
        model=list(model),
        num_microbatches=len(items),
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        decoder_seq_length=settings.seq_length,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return result


def loss_gradient(model: Sequence[MegatronModule], num_microbatches: int) -> Tensor:
    """Return the gradient that a micro-batch's loss receives: loss scale / number of micro-batches, float32 scalar.

    The operations are those of Megatron's schedule, so the value is equal bit for bit: it divides the loss by the
    number of micro-batches and passes it through ``grad_scale_func``. Context parallelism and per-token losses would
    bring further factors; the argument checks refuse both.
    """
    gradient = torch.ones((), device=accelerator.current().device)
    scale = get_model_config(model[0]).grad_scale_func
    if scale is not None:
        gradient = scale(gradient).reshape(())  # Megatron's optimizers keep their loss scale as [1]
    return gradient / num_microbatches


def loss_request(
    settings: PassSettings,
    batch: ScoredBatch,
    part: Microbatch,
    coefficients: Tensor,
    advantage_floor: float | None,
    gradient: Tensor,
    *,
    factor: int = 1,
) -> DistillationLoss:
    """Make the loss request of one micro-batch.

    Args:
        settings: Settings of the passes.
        batch: The scored batch that the micro-batch was cut from.
        part: The micro-batch.
        coefficients: [N, R] coefficients of the batch's tokens.
        advantage_floor: Lower bound of the advantages in nats, or None.
        gradient: Result of :func:`loss_gradient`.
        factor: Multiplies the coefficients.
    """
    device = accelerator.current().device
    return DistillationLoss(
        positions=part.positions,
        targets=part.targets,
        teacher_logprobs=batch.teacher_logprobs[part.rows, part.columns].to(device),
        rollout_logprobs=batch.rollout.rollout_logprobs[part.rows, part.columns].to(device),
        coefficients=(coefficients[part.rows, part.columns] * factor).float().to(device),
        advantage_floor=advantage_floor,
        importance=settings.importance,
        temperature=settings.temperature,
        valid_vocab_size=settings.vocab_size,
        loss_gradient=gradient,
    )


def score_responses(settings: PassSettings, model: Sequence[MegatronModule], rollout: RolloutBatch) -> Tensor:
    """Return only the log-probabilities of :func:`score_tokens`: [N, R] float32 on the CPU."""
    return score_tokens(settings, model, rollout, ScoreRequest()).logprobs


@torch.no_grad()
def score_tokens(
    settings: PassSettings, model: Sequence[MegatronModule], rollout: RolloutBatch, request: ScoreRequest
) -> TokenScores:
    """Score the response tokens of this rank's ``rollout`` (at least one row) under ``model``.

    All values are those at the sampling temperature, and zero beyond each response. Every tensor- and pipeline-parallel
    rank returns the same.
    """
    for chunk in model:
        chunk.eval()
    device = accelerator.current().device
    groups = groups_by_length(rollout, settings.micro_batch_size)
    microbatches = make_microbatches(rollout, groups, length_multiple=settings.length_multiple, device=device)
    items: list[WorkItem] = []
    for part in microbatches:
        asked = [x if x is None else x[part.rows, part.columns].to(device) for x in (request.ids, request.uniforms)]
        items.append(
            (
                part,
                ScoreTokens(
                    part.positions, part.targets, settings.temperature, settings.vocab_size, request.top_k, *asked
                ),
            )
        )
    answers = run_schedule(settings, model, items, forward_only=True)
    depths = {
        "id_logprobs": 0 if request.ids is None else request.ids.shape[2],
        "drawn": 0 if request.uniforms is None else request.uniforms.shape[2],
    }
    return TokenScores(
        logprobs=_collect(rollout, answers, "logprob", torch.float32),
        entropies=_collect(rollout, answers, "entropy", torch.float32),
        top_ids=_collect(rollout, answers, "top_ids", torch.int64, request.top_k),
        id_logprobs=_collect(rollout, answers, "id_logprobs", torch.float32, depths["id_logprobs"]),
        drawn_ids=_collect(rollout, answers, "drawn_ids", torch.int64, depths["drawn"]),
        drawn_logprobs=_collect(rollout, answers, "drawn_logprobs", torch.float32, depths["drawn"]),
    )


def _collect(
    rollout: RolloutBatch,
    answers: Sequence[tuple[Microbatch, dict[str, Tensor]]],
    name: str,
    dtype: torch.dtype,
    depth: int | None = None,
) -> Tensor:
    """Collect the result ``name`` of all micro-batches as [N, R] or [N, R, depth], on every pipeline rank."""
    shape = torch.Size([*rollout.rollout_logprobs.shape, *([] if depth is None else [depth])])
    values = None
    if depth == 0:
        return torch.zeros(shape, dtype=dtype)
    layout = Layout.current()
    if layout.last_stage:
        values = torch.zeros(shape, dtype=dtype)
        for microbatch, answer in answers:
            values[microbatch.rows, microbatch.columns] = answer[name].to(device="cpu", dtype=dtype)
    return broadcast_rows(
        values,
        shape,
        dtype,
        layout.stage_rank(-1),
        layout.pipeline.group,
    )


def accumulate_gradients(
    settings: PassSettings,
    model: Sequence[MegatronModule],
    batch: ScoredBatch,
    coefficients: Tensor,
    advantage_floor: float | None = None,
) -> tuple[float, int]:
    """Run forward and backward over the samples of the global ``batch`` that have a non-zero coefficient.

    The gradients are left in Megatron's buffers, summed over micro-batches and data-parallel ranks. Collective.

    Args:
        settings: Settings of the passes.
        model: The student's model chunks.
        batch: The global batch, the same on every rank.
        coefficients: [N, R] float32 coefficients of the tokens, see ``objective.TrainingWeights``.
        advantage_floor: Lower bound of the advantages in nats, or None.

    Returns:
        The global loss, and the number of tokens that the step trained on (padding included, without fillers), both
        over all data-parallel ranks.
    """
    for chunk in model:
        chunk.train()
    layout = Layout.current()
    trained = coefficients != 0
    groups, real_groups = share_of_selection(
        batch.rollout,
        trained.any(dim=1).nonzero().flatten(),
        rank=layout.data.rank,
        ranks=layout.data.size,
        size=settings.micro_batch_size,
    )
    device = accelerator.current().device
    microbatches = make_microbatches(
        batch.rollout, groups, length_multiple=settings.length_multiple, device=device, wanted=trained
    )
    # The coefficients are normalised over the global batch. Megatron's schedule divides the loss by the number of
    # micro-batches, and DDP averages the gradients over the data-parallel ranks: this factor undoes both.
    undo_averaging = len(microbatches) * layout.data.size
    gradient = loss_gradient(model, len(microbatches))
    items: list[WorkItem] = []
    for number, part in enumerate(microbatches):
        weight = undo_averaging if number < real_groups else 0
        items.append(
            (part, loss_request(settings, batch, part, coefficients, advantage_floor, gradient, factor=weight))
        )
    answers = run_schedule(settings, model, items, forward_only=False)
    totals = {
        "loss": sum(float(answer["loss"]) for answer in answers) / undo_averaging if layout.last_stage else 0.0,
        "tokens": float(sum(part.padded_tokens for part in microbatches[:real_groups])) if layout.last_stage else 0.0,
    }
    totals = sum_over(totals, layout.data.group)
    totals = sum_over(totals, layout.pipeline.group)
    return totals["loss"], int(totals["tokens"])
