"""The two passes of a step through Megatron's pipeline schedule: scoring (forward only) and training.

Both run micro-batches through Megatron's ``forward_backward_func``, each with a request to the last stage's output
head. Teacher and student are scored by the same code, so that their gap never contains a difference between two
implementations.
"""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest, TokenScores
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.model.microbatch import Microbatch, Piece, make_microbatches, response_pieces
from megatron_camopd.model.output_head import DistillationLoss, HeadRequest, ScoreTokens, answer_request
from megatron_camopd.model.packing import PackingRule, SequenceCost, balanced, imbalance
from megatron_camopd.objective.importance import ImportanceSettings
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.collectives import broadcast_rows, largest, sum_over, sum_tensor
from megatron_camopd.runtime.layout import Layout

WorkItem = tuple[Microbatch, HeadRequest]


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """Settings of the scoring and training passes, the same for a whole run.

    Attributes:
        packing: How sequences are packed into micro-batches.
        cost: Estimate of the time that a sequence takes, by which they are shared out among data-parallel ranks.
        vocab_size: Size of the vocabulary without padding.
        temperature: Sampling temperature: log-probabilities are those of softmax(logits / temperature).
        importance: Mode and bounds of the importance weights.
        shapes: Lengths of the micro-batches that this process has run with these settings.
    """

    packing: PackingRule
    cost: SequenceCost
    vocab_size: int
    temperature: float
    importance: tuple[str, float, float]
    shapes: set[int] = field(default_factory=set)

    @staticmethod
    def of(args: Namespace) -> "PassSettings":
        """Read the settings from checked arguments; the model parallelism must be initialised."""
        return PassSettings(
            packing=PackingRule.of(args, Layout.current().context.rank),
            cost=SequenceCost.of(args),
            vocab_size=args.vocab_size,
            temperature=SamplingSettings.of(args).rollout_temperature,
            importance=ImportanceSettings.of(args).weights,
        )

    def shares(self, lengths: Sequence[int], loads: list[int] | None = None) -> list[list[int]]:
        """Share sequences out among the data-parallel ranks; see :func:`balanced`."""
        return balanced([self.cost(length) for length in lengths], Layout.current().data.size, loads)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave :attr:`shapes` as they are; for passes that a run does without effect on its records."""
        seen = self.shapes.copy()
        yield
        self.shapes.intersection_update(seen)

    def microbatches(self, pieces: Sequence[Piece]) -> list[Microbatch]:
        """Pack this rank's ``pieces``; all ranks get equally many micro-batches, at least one; collective."""
        bins = self.packing.bins([len(piece.token_ids) for piece in pieces])
        fillers = max(1, largest(len(bins), Layout.current().data.group)) - len(bins)
        groups = [[pieces[place] for place in places] for places in bins] + [[]] * fillers
        found = make_microbatches(groups, self.packing, device=accelerator.current().device)
        self.shapes.update(part.padded_tokens for part in found)
        return found


@dataclass(frozen=True)
class TrainedPass:
    """Outcome of a training pass, the same on every rank.

    Attributes:
        loss: The loss of the global batch.
        tokens: Tokens of the trained sequences, without padding.
        balance: Tokens of the data-parallel rank with the most over the mean.
    """

    loss: float
    tokens: int
    balance: float


def forward_step(items: Iterator[WorkItem], model: MegatronModule) -> tuple[Any, Any]:
    """Run one micro-batch: Megatron's forward step function, which returns the output and a function of it."""
    microbatch, request = next(items)
    output = model(
        microbatch.tokens,
        microbatch.position_ids,
        output_processor=answer_request,
        output_processor_context=request,
        attention_mask=None,
        packed_seq_params=microbatch.packed,
    )
    return output, partial(_read_loss, microbatch)


def _read_loss(microbatch: Microbatch, output: dict[str, Tensor], non_loss_data: bool = False) -> Any:
    """Return the loss and what to report (training), or the micro-batch with the head's results (scoring)."""
    if non_loss_data:
        return microbatch, output
    # A copy, because Megatron's schedule divides the loss in place by the number of micro-batches.
    return output["loss"], {"loss": output["loss"].detach().clone(), "logprob": output["logprob"]}


def run_schedule(model: Sequence[MegatronModule], items: Sequence[WorkItem], *, forward_only: bool) -> list[Any]:
    """Run Megatron's schedule over ``items``; returns :func:`_read_loss` of each on the last stage, else []."""
    longest = max(microbatch.tokens.shape[1] for microbatch, _ in items)
    result: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(items),
        model=list(model),
        num_microbatches=len(items),
        seq_length=longest,
        micro_batch_size=1,
        decoder_seq_length=longest,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return result


def loss_gradient(model: Sequence[MegatronModule], num_microbatches: int) -> Tensor:
    """Return the gradient that a micro-batch's loss receives, a float32 scalar.

    It is loss scale / number of micro-batches x number of context-parallel ranks. The operations are those of
    Megatron's schedule, so the value is equal bit for bit: the schedule multiplies the loss by that number, because DDP
    takes the mean over these ranks too, divides it by the number of micro-batches and passes it through
    ``grad_scale_func``. Per-token losses would bring further factors; the argument checks refuse them.
    """
    gradient = torch.ones((), device=accelerator.current().device)
    scale = get_model_config(model[0]).grad_scale_func
    if scale is not None:
        gradient = scale(gradient).reshape(())  # Megatron's optimizers keep their loss scale as [1]
    return gradient / num_microbatches * Layout.current().context.size


def loss_request(
    settings: PassSettings,
    batch: ScoredBatch,
    part: Microbatch,
    coefficients: Tensor,
    advantage_floor: float | None,
    gradient: Tensor,
    *,
    factor: float = 1,
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
    """Score the response tokens of this data-parallel rank's ``rollout`` under ``model``; collective.

    All values are those at the sampling temperature, and zero beyond each response. Every rank of the replica returns
    the same. A rank may have no rows.
    """
    for chunk in model:
        chunk.eval()
    device = accelerator.current().device
    items: list[WorkItem] = []
    for part in settings.microbatches(response_pieces(rollout, torch.arange(len(rollout)))):
        asked = [x if x is None else x[part.rows, part.columns].to(device) for x in (request.ids, request.uniforms)]
        head = ScoreTokens(
            part.positions, part.targets, settings.temperature, settings.vocab_size, request.top_k, *asked
        )
        items.append((part, head))
    answers = run_schedule(model, items, forward_only=True)
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
    """Collect the result ``name`` of all micro-batches as [N, R] or [N, R, depth], on every rank of the replica."""
    shape = torch.Size([*rollout.rollout_logprobs.shape, *([] if depth is None else [depth])])
    values = torch.zeros(shape, dtype=dtype)
    if not values.numel():
        return values
    layout = Layout.current()
    if layout.last_stage:
        for microbatch, answer in answers:
            values[microbatch.rows, microbatch.columns] = answer[name].to(device="cpu", dtype=dtype)
        values = sum_tensor(values, layout.context.group)  # every rank has the predictions made in its own chunks
    source = values if layout.last_stage else None
    return broadcast_rows(source, shape, dtype, layout.stage_rank(-1), layout.pipeline.group)


def accumulate_gradients(
    settings: PassSettings,
    model: Sequence[MegatronModule],
    batch: ScoredBatch,
    coefficients: Tensor,
    advantage_floor: float | None = None,
) -> TrainedPass:
    """Run forward and backward over the samples of the global ``batch`` that have a non-zero coefficient.

    The gradients are left in Megatron's buffers, summed over micro-batches, data- and context-parallel ranks.
    Collective.

    Args:
        settings: Settings of the passes.
        model: The student's model chunks.
        batch: The global batch, the same on every rank.
        coefficients: [N, R] float32 coefficients of the tokens, see ``objective.TrainingWeights``.
        advantage_floor: Lower bound of the advantages in nats, or None.
    """
    trained = coefficients != 0
    rows = trained.any(dim=1).nonzero().flatten()
    lengths = batch.rollout.lengths[rows].tolist()
    shares = settings.shares(lengths)
    own = rows[shares[Layout.current().data.rank]]

    def request(part: Microbatch, factor: float, gradient: Tensor) -> DistillationLoss:
        return loss_request(settings, batch, part, coefficients, advantage_floor, gradient, factor=factor)

    loss, tokens = accumulate(settings, model, response_pieces(batch.rollout, own, trained), request)
    return TrainedPass(loss, tokens, imbalance(shares, lengths))


def accumulate(
    settings: PassSettings,
    model: Sequence[MegatronModule],
    pieces: Sequence[Piece],
    request: Callable[[Microbatch, float, Tensor], DistillationLoss],
) -> tuple[float, int]:
    """Run forward and backward over this data-parallel rank's ``pieces``; collective.

    Args:
        settings: Settings of the passes.
        model: The model chunks.
        pieces: Sequences to train on; a rank may have none.
        request: Returns the loss of a micro-batch, with its coefficients multiplied by the second argument; the third
            is the result of :func:`loss_gradient`.

    Returns:
        The loss, and the number of tokens of the sequences, over all ranks.
    """
    for chunk in model:
        chunk.train()
    layout = Layout.current()
    microbatches = settings.microbatches(pieces)
    # The coefficients are normalised over the global batch. Megatron's schedule divides the loss by the number of
    # micro-batches, and DDP averages the gradients over the data-parallel ranks: this factor undoes both.
    undo_averaging = len(microbatches) * layout.data.size
    gradient = loss_gradient(model, len(microbatches))
    items: list[WorkItem] = [(part, request(part, undo_averaging, gradient)) for part in microbatches]
    answers = run_schedule(model, items, forward_only=False)
    loss = sum(float(answer["loss"]) for answer in answers) / undo_averaging  # no answers but on the last stage
    tokens = sum_over({"tokens": float(sum(len(piece.token_ids) for piece in pieces))}, layout.data.group)
    return total(loss), int(tokens["tokens"])


def total(value: float) -> float:
    """Return the sum of ``value`` over the ranks of the last stage that hold different tokens, on every rank."""
    layout = Layout.current()
    value = value if layout.last_stage else 0.0
    for group in (layout.data.group, layout.context.group, layout.pipeline.group):
        value = sum_over({"value": value}, group)["value"]
    return value
