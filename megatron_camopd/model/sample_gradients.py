"""Gradients of single samples from Megatron's backward pass, and sums of them, without an effect on the training.

A pass inside :func:`own_gradients` leaves in ``main_grad`` what ``finalize_model_grads`` would, except for the
data-parallel reduction. Gradients of parameters that are replicated over tensor-parallel ranks are summed over those
ranks, those of tied word embeddings over the first and last pipeline stage, and all over the context-parallel ranks,
which hold parts of the sample; nothing is reduced or averaged over data-parallel ranks, and no overlapped reduction
starts. :func:`nothing_disturbed` restores the state that training
depends on.

Sums and inner products count every parameter of the model once: replicas on other tensor-parallel ranks and the last
stage's copy of a tied embedding are left out. Each sum is a float32 vector of the parameters that this rank counts;
squares and inner products are computed in float64.
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
from megatron_camopd.model.microbatch import make_microbatches, response_pieces
from megatron_camopd.model.passes import PassSettings, loss_gradient, loss_request, run_schedule
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Layout

# Functions in the model's configuration that reduce over data-parallel ranks.
_REDUCTIONS = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
_PRODUCT_ELEMENTS = 2**22  # elements that are converted to float64 at a time


@contextmanager
def nothing_disturbed(model: Sequence[MegatronModule]) -> Iterator[None]:
    """Restore random states and the parameters' ``grad`` and flags on leaving, and zero the gradient buffers."""
    (chunk,) = model  # the argument checks refuse interleaved pipelines
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    before = [(parameter.grad_added_to_main_grad, parameter.grad) for parameter in parameters]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    try:
        yield
    finally:
        chunk.zero_grad_buffer()
        for parameter, (flag, gradient) in zip(parameters, before, strict=True):
            parameter.grad_added_to_main_grad, parameter.grad = flag, gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state(states[3])
        get_cuda_rng_tracker().set_states(tracked)


@contextmanager
def own_gradients(model: Sequence[MegatronModule]) -> Iterator[None]:
    """Make training passes inside leave the gradients of only this data-parallel rank in ``main_grad``.

    The gradients include the loss scale. Collective over tensor-, pipeline- and context-parallel ranks.
    """
    (chunk,) = model
    config = get_model_config(chunk)
    before = {name: getattr(config, name) for name in _REDUCTIONS}
    chunk.zero_grad_buffer()
    # Megatron's float32 optimizer leaves ``main_grad`` itself as ``grad``. Autograd would add the first gradients to it
    # in place, DDP's hook would double them, and the head's placeholder without contents would be added too.
    for parameter in chunk.parameters():
        parameter.grad = None
    config.finalize_model_grads_func = _finalize_without_data_parallel
    # With these, the schedule would switch the reductions on again for the last micro-batch.
    config.no_sync_func = config.grad_sync_func = None
    try:
        with chunk.no_sync():
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _finalize_without_data_parallel(model: list[MegatronModule], num_tokens: Any = None, **_: Any) -> None:
    """Do what Megatron's ``finalize_model_grads`` does, except over data-parallel ranks.

    This is complete for a dense model. The parts of the context-parallel ranks are summed: the loss that a rank passes
    back has their number as a factor (see ``loss_gradient``), which the unscaling takes away.
    """
    assert num_tokens is None, "the argument checks refuse per-token losses"
    config, layout = get_model_config(model[0]), Layout.current()
    if layout.context.size > 1:
        for buffer in model[0].buffers:
            dist.all_reduce(buffer.grad_data, group=layout.context.group)
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
    """Run forward and backward of one sample; to be called inside :func:`own_gradients`.

    The loss is -sum_t c_t w_t max(A_t, floor) log pi_theta(y_t).

    Args:
        settings: Settings of the passes.
        model: The student's model chunks.
        batch: Scored batch that holds the sample.
        row: Row of the sample in ``batch``.
        coefficients: [N, R] float32 coefficients c of the batch's tokens; those of ``row`` must not all be 0.
        advantage_floor: Lower bound of the advantages A in nats, or None.
    """
    for chunk in model:
        chunk.train()
    rows = torch.tensor([row])
    sample, own = batch.take(rows), coefficients[rows]
    # A single micro-batch: the schedule's mean over micro-batches changes nothing.
    pieces = response_pieces(sample.rollout, torch.tensor([0]), own != 0)
    (part,) = make_microbatches([pieces], settings.packing, device=accelerator.current().device)
    request = loss_request(settings, sample, part, own, advantage_floor, loss_gradient(model, 1))
    run_schedule(model, [(part, request)], forward_only=False)


class GradientSums:
    """Sums of gradients, one per key, over the parameters that this rank counts.

    Of a parameter that several model-parallel ranks hold, only one of them counts its copy. The sums take 4 bytes per
    parameter and key. All ranks must be given the same ``keys``.
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
        """Memory of the sums on this rank."""
        return sum(total.numel() * total.element_size() for total in self._sums.values())

    def add(self, key: Hashable, factor: float = 1.0) -> Tensor:
        """Add ``factor`` times the gradients in ``main_grad``, divided by the loss scale, to the sum of ``key``.

        Returns:
            The squared norm of the gradients (without ``factor``) over the parameters that this rank counts, float64
            scalar.
        """
        unscale = 1.0 / float(loss_gradient(self._model, 1))
        square = torch.zeros((), dtype=torch.float64, device=accelerator.current().device)
        for view, parameter in zip(self._views[key], self._parameters, strict=True):
            gradient = parameter.main_grad.flatten()
            view.add_(gradient, alpha=factor * unscale)
            square += _dot(gradient, gradient)
        return square * unscale**2

    def products(self) -> Tensor:
        """Return the inner products of the K sums over all parameters and data-parallel ranks: [K, K] float64 (CPU).

        Rows and columns are in the order of the keys. Collective. To be called once, at the end, because it replaces
        this rank's sums by those over all data-parallel ranks.
        """
        layout, totals = Layout.current(), list(self._sums.values())
        for total in totals:
            _summed(total, layout.data.group)
        gram = torch.stack([torch.stack([_dot(one, other) for other in totals]) for one in totals])
        return _summed(gram, layout.model_group).cpu()


def squared_norms(local: Tensor) -> Tensor:
    """Sum the results of :meth:`GradientSums.add` for M samples over all parameters: [M] float64 (CPU).

    Collective.

    Args:
        local: [M] float64 results of this rank; 0 for samples that another data-parallel rank computed.
    """
    layout = Layout.current()
    return _summed(_summed(local, layout.model_group), layout.data.group).cpu()


def _summed(values: Tensor, group: Any) -> Tensor:
    """Sum ``values`` over ``group``, in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of two vectors in float64, computed in pieces to save memory."""
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for a, b in zip(one.split(_PRODUCT_ELEMENTS), other.split(_PRODUCT_ELEMENTS), strict=True):
        total += torch.dot(a.double(), b.double())
    return total
