"""The two passes of a step through Megatron's pipeline schedule: scoring (forward only) and training.

Both feed :class:`~megatron_camopd.model.microbatch.Microbatch` es to ``forward_backward_func`` and ask the last
stage's output head for what they need. Teacher and student are scored by the same code, so that their gap
never contains a difference between two implementations.
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
    """Settings of the passes of a run.

    micro_batch_size  rows of a microbatch at most
    seq_length        tokens of the longest sequence, padding included
    length_multiple   sequences are padded to a multiple of it: sequence parallelism splits them evenly over ranks
    vocab_size        ids of the vocabulary, without padding
    transformer_impl  Megatron's layers: "local" or "transformer_engine"
    temperature       of sampling: log-probabilities are those of softmax(logits / temperature)
    importance        mode and bounds of the importance weights
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
    """Megatron's forward step function: run one microbatch, hand the head's answer to the loss function."""
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
    if non_loss_data:
        return microbatch, output
    # The schedule divides by the number of microbatches and DDP averages over the data-parallel ranks; the
    # coefficients are already normalised over the whole global batch, so both are undone beforehand. It divides
    # in place: the value that is reported must be a copy.
    return output["loss"], {"loss": output["loss"].detach().clone(), "logprob": output["logprob"]}


def run_schedule(
    settings: PassSettings, model: Sequence[MegatronModule], items: Sequence[WorkItem], *, forward_only: bool
) -> list[Any]:
    """Megatron's schedule over ``items``; on the last stage what the loss function returned for each, else []."""
    return get_forward_backward_func()(
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


def loss_gradient(model: Sequence[MegatronModule], num_microbatches: int) -> Tensor:
    """What the backward pass of a microbatch begins with (float32 scalar): loss scale / number of microbatches.

    By the operations of Megatron's schedule, so equal bit for bit: it divides the loss by the number of microbatches
    and passes it through ``grad_scale_func``. Its other factors, context parallelism and per-token losses, are refused
    by the arguments.
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
    """The loss of a microbatch cut from ``batch``; ``coefficients`` [N, R] of the batch's tokens, times ``factor``.

    ``gradient``: of :func:`loss_gradient`.
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
    """The log-probabilities alone of :func:`score_tokens`: [N, R] float32 (CPU)."""
    return score_tokens(settings, model, rollout, ScoreRequest()).logprobs


@torch.no_grad()
def score_tokens(
    settings: PassSettings, model: Sequence[MegatronModule], rollout: RolloutBatch, request: ScoreRequest
) -> TokenScores:
    """What ``model`` says about the response tokens of this rank's ``rollout`` (at least one row).

    At the sampling temperature; zero beyond each response. The same on every tensor- and pipeline-parallel rank.
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
    """One value of the last stage's ``answers`` as [N, R] (or [N, R, depth]) on every pipeline rank."""
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
    """Forward and backward over the samples of the global ``batch`` that have a coefficient other than zero.

    ``coefficients`` [N, R] float32 of the tokens (``objective.TrainingWeights``). Gradients are left in Megatron's
    buffers, summed over microbatches and data-parallel ranks. Returns the global loss and the tokens (padding included)
    that this step trained on, over all data-parallel ranks. Collective.
    """
    for chunk in model:
        chunk.train()
    layout = Layout.current()
    trained = coefficients != 0
    groups, filled = share_of_selection(
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
    undo_averaging = len(microbatches) * layout.data.size
    gradient = loss_gradient(model, len(microbatches))
    items: list[WorkItem] = []
    for number, part in enumerate(microbatches):
        weight = undo_averaging if number < filled else 0
        items.append(
            (part, loss_request(settings, batch, part, coefficients, advantage_floor, gradient, factor=weight))
        )
    answers = run_schedule(settings, model, items, forward_only=False)
    totals = {
        "loss": sum(float(answer["loss"]) for answer in answers) / undo_averaging if layout.last_stage else 0.0,
        "tokens": float(sum(part.padded_tokens for part in microbatches[:filled])) if layout.last_stage else 0.0,
    }
    totals = sum_over(totals, layout.data.group)
    totals = sum_over(totals, layout.pipeline.group)
    return totals["loss"], int(totals["tokens"])
