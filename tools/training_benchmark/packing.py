"""Padded against packed micro-batches: scoring and training of ragged rollouts, and a packed row of fine-tuning."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_camopd.batch import RolloutBatch, ScoredBatch, ScoreRequest
from megatron_camopd.data import EncodedConversation
from megatron_camopd.model.packing import balanced, imbalance
from megatron_camopd.model.passes import PassSettings, accumulate_gradients, score_tokens
from megatron_camopd.model.supervised import accumulate_cross_entropy
from megatron_camopd.objective.method import broadcast_to_tokens
from tools.head_benchmark.memory import peak_growth, return_freed_memory
from tools.training_benchmark.baselines import MaskedAttention, PaddedSettings, mask_of

SHORTEST, LONGEST = 16, 512
ROWS = (1, 4, 16)
BUDGETS = (1024, 2048)
RANKS = 8
_MEDIAN, _SIGMA = 90, 0.9
_CONVERSATION = 64


def ragged_lengths(count: int) -> list[int]:
    """Return lognormal lengths of rollouts, from :data:`SHORTEST` to :data:`LONGEST` tokens."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return (math.log(_MEDIAN) + _SIGMA * normal).exp().round().clamp(SHORTEST, LONGEST).long().tolist()


def ragged_batch(count: int, vocabulary: int) -> ScoredBatch:
    """Make a scored batch of random tokens with these lengths, of which a quarter is the prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(ragged_lengths(count))
    prompts = lengths // 4
    responses = lengths - prompts
    shape = (count, int(responses.max()))
    student = -8 * torch.rand(shape, generator=generator)
    rollout = RolloutBatch(
        indices=torch.arange(count),
        tokens=torch.randint(vocabulary, (count, int(lengths.max())), generator=generator),
        prompt_lengths=prompts,
        response_lengths=responses,
        rollout_logprobs=student,
        truncated=torch.zeros(count, dtype=torch.bool),
    )
    return ScoredBatch(
        rollout, torch.zeros(count, dtype=torch.int64), student + torch.randn(shape, generator=generator), student
    )


class PackingBenchmark:
    """The calls that are timed, and what is measured beside them.

    Args:
        trainer: The trainer whose model runs.
        samples: Number of ragged rollouts.
        row: Tokens of the packed row of fine-tuning.
    """

    def __init__(self, trainer: Any, samples: int, row: int) -> None:
        self._trainer, self._model, passes = trainer, trainer.model, trainer.passes
        self._batch = ragged_batch(samples, passes.vocab_size)
        self._row = [
            EncodedConversation(str(number), [7] * _CONVERSATION, [False] * 8 + [True] * (_CONVERSATION - 8))
            for number in range(max(1, row // _CONVERSATION))
        ]
        fields = {field.name: getattr(passes, field.name) for field in dataclasses.fields(PassSettings)}
        self._settings: dict[str, PassSettings] = {
            f"padded, {rows} rows": PaddedSettings(**fields, rows=rows) for rows in ROWS
        }
        for budget in BUDGETS:
            rule = dataclasses.replace(passes.packing, max_tokens=budget)
            self._settings[f"packed, {budget} tokens"] = dataclasses.replace(passes, packing=rule)
        rule = dataclasses.replace(passes.packing, max_tokens=max(row, _CONVERSATION))
        self._whole_row = dataclasses.replace(passes, packing=rule)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Return the calls to time, by name."""
        found: dict[str, Callable[[], Any]] = {}
        for name, settings in self._settings.items():
            found[f"score: {name}"] = partial(score_tokens, settings, self._model, self._batch.rollout, ScoreRequest())
            found[f"train: {name}"] = partial(self._train, settings)
        for name in ("mask", "packed"):
            found[f"fine-tune: {name}"] = partial(self._fine_tune, masked=name == "mask")
        return found

    def report(self) -> dict[str, Any]:
        """Return numbers beside the times: padding, balance over ranks, and peak memory of fine-tuning."""
        lengths = self._batch.rollout.lengths.tolist()
        ordered = sorted(lengths, reverse=True)
        padded = {rows: sum(len(group) * group[0] for group in _groups(ordered, rows)) / sum(lengths) for rows in ROWS}
        in_order = [list(range(rank, len(lengths), RANKS)) for rank in range(RANKS)]
        dealt = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        shares = {
            "in the order of the rows": in_order,
            "dealt longest first": [dealt[rank::RANKS] for rank in range(RANKS)],
            "by estimated cost": balanced([self._trainer.passes.cost(length) for length in lengths], RANKS),
        }
        return_freed_memory()
        memory = {
            name: peak_growth(partial(self._fine_tune, masked=name == "mask"), torch.device("cpu"))
            for name in ("mask", "packed")
        }
        return {
            "tokens": sum(lengths),
            "padded_over_real": {f"{rows} rows": value for rows, value in padded.items()},
            "balance": {name: imbalance(share, lengths) for name, share in shares.items()},
            "fine_tune_peak_bytes": memory,
        }

    def _train(self, settings: PassSettings) -> None:
        lengths = self._batch.rollout.response_lengths
        coefficients = broadcast_to_tokens(1.0 / (len(lengths) * lengths.double()), self._batch.response_mask)
        self._trainer.clear_gradients()
        accumulate_gradients(settings, self._model, self._batch, coefficients)

    def _fine_tune(self, *, masked: bool) -> None:
        """Run forward and backward over one packed row."""
        layers = unwrap_model(self._model[0]).decoder.layers
        before = [layer.self_attention.core_attention for layer in layers]
        if masked:
            mask = mask_of([len(conversation) for conversation in self._row])
            for layer, plain in zip(layers, before, strict=True):
                layer.self_attention.core_attention = _masked(plain, layer, mask)
        self._trainer.clear_gradients()
        trained = sum(sum(conversation.trained) for conversation in self._row)
        accumulate_cross_entropy(self._whole_row, self._model, self._row, trained)
        for layer, plain in zip(layers, before, strict=True):
            layer.self_attention.core_attention = plain


def _masked(plain: Any, layer: Any, mask: torch.Tensor) -> MaskedAttention:
    from megatron.core.transformer.enums import AttnMaskType

    attention = MaskedAttention(
        plain.config, layer.layer_number, AttnMaskType.padding, "self", pg_collection=layer.self_attention.pg_collection
    )
    attention.mask = mask
    return attention


def _groups(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
