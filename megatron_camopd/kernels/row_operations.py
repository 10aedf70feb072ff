"""The interface between the head and its back ends: operations on the rows of a block of logits.

Logits are [C, V] fp32 as they come from the product, rows one after the other (stride of columns 1); the temperature
is applied here: z = logits * inverse_temperature. ``columns`` say which of the V columns a target is, -1: none of them.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What turns the log-probability of C tokens into their gradient (see ``kernels.distill_head``); [C] fp32 each.

    coefficients: c_n v_n. gradient_scale [1]: the factor between the loss and the gradient that is written.
    importance: (mode, low, high).
    """

    teacher_logprobs: Tensor
    rollout_logprobs: Tensor
    coefficients: Tensor
    gradient_scale: Tensor
    importance: tuple[str, float, float]
    advantage_floor: float | None

    def of(self, rows: slice) -> "Feedback":
        """Of some of the tokens."""
        return dataclasses.replace(
            self,
            teacher_logprobs=self.teacher_logprobs[rows],
            rollout_logprobs=self.rollout_logprobs[rows],
            coefficients=self.coefficients[rows],
        )


# What is recorded of a token, one column of [N, 6] fp32 each, in this order.
RECORD = ("logprob", "entropy", "gap", "importance", "feedback", "loss")


class RowOperations(Protocol):
    """A back end. Its functions are deterministic: no atomics, every row summed in one order."""

    def partial_statistics(self, logits: Tensor, columns: Tensor, inverse_temperature: float) -> Tensor:
        """Partials [C, 3 + K] fp32 (see ``kernels.vocab_parallel``) of ``logits``; columns [C, K] int64."""

    def distill(
        self,
        logits: Tensor,
        columns: Tensor,
        parts: Tensor | None,
        feedback: Feedback,
        inverse_temperature: float,
        gradient_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The records [C, 6] (``RECORD``) of the rows, and the gradient of the loss to the logits, written over them.

        columns [C] int64. parts [P, C, 4]: the partials of all parts of the rows; None: ``logits`` are whole rows.
        gradient_dtype: bf16 may be written as such; None leaves the logits alone and returns no gradient.
        """

    def softmax_gradient(
        self,
        logits: Tensor,
        columns: Tensor,
        top: Tensor,
        log_mass: Tensor,
        upstream: Tensor,
        inverse_temperature: float,
        gradient_dtype: torch.dtype,
    ) -> Tensor:
        """Gradient of sum_k upstream_k logprob_k to the logits [C, V], written over them; columns, upstream [C, K].

        top, log_mass: [C] of ``RowStatistics``. Rows whose upstream is all 0 get 0, whatever they hold.
        """
