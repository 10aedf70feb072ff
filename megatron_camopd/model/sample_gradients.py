"""Gradients of single samples from Megatron's backward pass, and sums of them, without a trace in the training.

A pass inside :func:`own_gradients` leaves in ``main_grad`` what ``finalize_model_grads`` would, but for the
data-parallel part: gradients of parameters that tensor-parallel ranks hold alike are summed over those ranks, those of
tied word embeddings over the pipeline stages; nothing is reduced or averaged over data parallelism, and no overlapped
reduction starts. :func:`nothing_disturbed` puts back what training would notice.

Sums and products count every parameter of the model once: copies on other tensor-parallel ranks, and the last stage's
copy of a tied embedding, are left out. What is kept for each sum is a float32 vector of this rank's own parameters;
squares and products are taken and added in float64.
"""

import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads,
    _allreduce_word_embedding_grads,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker, param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_camopd.batch import ScoredBatch
from megatron_camopd.model.microbatch import make_microbatches
from megatron_camopd.model.passes import PassSettings, loss_gradient, loss_request, run_schedule
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Layout

# What of the model's configuration reaches over data parallelism.
_REDUCTIONS = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
_PRODUCT_ELEMENTS = 2**22  # widened to float64 at a time


@contextmanager
def nothing_disturbed(model: Sequence[MegatronModule]) -> Iterator[None]:
    """Afterwards gradient buffers are zero; random states and the parameters' flags are what they were before."""
    (chunk,) = model  # interleaved pipelines are refused by the arguments
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    flags = [parameter.grad_added_to_main_grad for parameter in parameters]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    try:
        yield
    finally:
        chunk.zero_grad_buffer()
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.grad_added_to_main_grad = flag
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state(states[3])
        get_cuda_rng_tracker().set_states(tracked)


@contextmanager
def own_gradients(model: Sequence[MegatronModule]) -> Iterator[None]:
    """Training passes inside leave this data-parallel rank's gradients alone in ``main_grad``, complete.

    They are multiplied by the loss scale. Collective over tensor- and pipeline-parallel ranks.
    """
    (chunk,) = model
    config = get_model_config(chunk)
    before = {name: getattr(config, name) for name in _REDUCTIONS}
    chunk.zero_grad_buffer()
    config.finalize_model_grads_func = _finalize_without_data_parallel
    # The schedule's own use of these would switch reductions on again for the last microbatch.
    config.no_sync_func = config.grad_sync_func = None
    try:
        with chunk.no_sync():
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _finalize_without_data_parallel(model: list[MegatronModule], num_tokens: Any = None, **_: Any) -> None:
    """The parts of Megatron's ``finalize_model_grads`` that a dense model without context parallelism has left."""
    assert num_tokens is None, "per-token losses are refused by the arguments"
    config, layout = get_model_config(model[0]), Layout.current()
    _allreduce_non_tensor_model_parallel_grads(model, config, layout.tensor.group)
    _allreduce_word_embedding_grads(
        model,
        config,
        layout.embedding_group,
        layout.pipeline.group,
    )


def backward_of_sample(
    settings: PassSettings,
    model: Sequence[MegatronModule],
    batch: ScoredBatch,
    row: int,
    coefficients: Tensor,
    advantage_floor: float | None,
) -> None:
    """Forward and backward of one sample, to be called inside :func:`own_gradients`.

    ``row`` of ``batch``; ``coefficients`` [N, R] float32 of the batch's tokens, of which those of the row, not all 0,
    are used: the loss is -sum_t c_t w_t max(A_t, floor) log pi_theta(y_t).
    """
    for chunk in model:
        chunk.train()
    rows = torch.tensor([row])
    sample, own = batch.take(rows), coefficients[rows]
    device = accelerator.current().device
    # One row is one microbatch, so nothing has to be undone of the schedule's mean.
    (part,) = make_microbatches(
        sample.rollout,
        [torch.tensor([0])],
        length_multiple=settings.length_multiple,
        device=device,
        wanted=own != 0,
    )
    request = loss_request(settings, sample, part, own, advantage_floor, loss_gradient(model, 1))
    run_schedule(settings, model, [(part, request)], forward_only=False)


class GradientSums:
    """Sums of gradients, one per key, over this rank's own parameters: 4 bytes a parameter and key.

    All ranks must name the same ``keys``. "Own": the parameters of its shard that no lower rank counts.
    """

    def __init__(self, model: Sequence[MegatronModule], keys: Sequence[Hashable]) -> None:
        (chunk,) = model
        self._model = model
        self._parameters = [
            parameter
            for parameter in chunk.parameters()
            if parameter.requires_grad
            and param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        sizes = [parameter.numel() for parameter in self._parameters]
        device = accelerator.current().device
        self._sums = {key: torch.zeros(sum(sizes), dtype=torch.float32, device=device) for key in keys}
        self._views = {key: total.split(sizes) for key, total in self._sums.items()}

    @property
    def bytes(self) -> int:
        """Memory that the sums take on this rank."""
        return sum(total.numel() * total.element_size() for total in self._sums.values())

    def add(self, key: Hashable, factor: float = 1.0) -> Tensor:
        """Add ``factor`` times the gradients in ``main_grad``, rid of the loss scale, to a sum.

        Returns their squared norm (float64 scalar, without ``factor``) over this rank's own parameters.
        """
        unscale = 1.0 / float(loss_gradient(self._model, 1))
        square = torch.zeros((), dtype=torch.float64, device=accelerator.current().device)
        for view, parameter in zip(self._views[key], self._parameters, strict=True):
            gradient = parameter.main_grad.flatten()
            view.add_(gradient, alpha=factor * unscale)
            square += _dot(gradient, gradient)
        return square * unscale**2

    def products(self) -> Tensor:
        """[K, K] float64 (CPU): inner products of the sums over all data-parallel ranks, in the order of the keys.

        Over all parameters of the model. Collective; called once, at the end.
        """
        layout, totals = Layout.current(), list(self._sums.values())
        for total in totals:
            _over(total, layout.data.group)
        gram = torch.stack([torch.stack([_dot(one, other) for other in totals]) for one in totals])
        return _over(gram, layout.model_group).cpu()


def squared_norms(local: Tensor) -> Tensor:
    """[M] float64 (CPU) over all parameters, from what :meth:`GradientSums.add` returned for each sample.

    ``local`` [M]: 0 for samples that another data-parallel rank computed. Collective.
    """
    layout = Layout.current()
    return _over(_over(local, layout.model_group), layout.data.group).cpu()


def _over(values: Tensor, group: Any) -> Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of two vectors in float64, a part at a time: a float64 copy of all of it would not fit."""
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for a, b in zip(one.split(_PRODUCT_ELEMENTS), other.split(_PRODUCT_ELEMENTS), strict=True):
        total += torch.dot(a.double(), b.double())
    return total
