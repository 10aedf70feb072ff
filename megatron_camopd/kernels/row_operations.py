"""Interface between the head and its back ends: operations on the rows of a block of logits.

Logits are [C, V] fp32 as the matrix product returns them, with column stride 1. The row operations apply the
temperature: z = logits * inverse_temperature. ``columns`` holds the column of each target, or -1 for a target that is
not among these V columns.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Inputs of the distillation loss beside the logits of C tokens (equation in ``kernels.distill_head``).

    Attributes:
        teacher_logprobs: [C] fp32, nats.
        rollout_logprobs: [C] fp32, nats.
        coefficients: [C] fp32, c_n v_n.
        gradient_scale: [1] fp32, factor on the gradient of the loss.
        importance: (mode, low, high) of the importance weight.
        advantage_floor: lower limit of A_n, nats; None for no limit.
    """

    teacher_logprobs: Tensor
    rollout_logprobs: Tensor
    coefficients: Tensor
    gradient_scale: Tensor
    importance: tuple[str, float, float]
    advantage_floor: float | None

    def select(self, rows: slice) -> "LossInputs":
        """Return the inputs of some of the tokens."""
        return dataclasses.replace(
            self,
            teacher_logprobs=self.teacher_logprobs[rows],
            rollout_logprobs=self.rollout_logprobs[rows],
            coefficients=self.coefficients[rows],
        )


# The six fields of a token's record, in the order of the columns of the records [N, 6] fp32. See ``TokenMetrics``.
RECORD = ("logprob", "entropy", "gap", "importance", "feedback", "loss")


class RowOperations(Protocol):
    """Back end for the row operations.

    Its functions are deterministic: they use no atomics and sum every row in a fixed order.
    """

    def partial_statistics(self, logits: Tensor, columns: Tensor, inverse_temperature: float) -> Tensor:
        """Return the partials [C, 3 + K] fp32 (see ``kernels.vocab_parallel``) of ``logits``; columns: [C, K] int64."""

    def distill(
        self,
        logits: Tensor,
        columns: Tensor,
        partials: Tensor | None,
        inputs: LossInputs,
        inverse_temperature: float,
        gradient_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of each token, and overwrite the logits with the gradient of the loss.

        Args:
            logits: [C, V] fp32.
            columns: [C] int64.
            partials: [P, C, 4] fp32, the partials of all P parts of the rows; None if ``logits`` holds whole rows.
            inputs: the other inputs of the loss.
            inverse_temperature: 1 / T.
            gradient_dtype: dtype in which the caller prefers the gradient; a back end may return fp32 instead. None:
                no gradient is computed and the logits stay as they are.

        Returns:
            (records [C, 6] fp32, see ``RECORD``; gradient [C, V] or None, in the memory of ``logits``).
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
        """Overwrite the logits with the gradient of sum_k upstream_k logprob_k, and return it.

        Args:
            logits: [C, V] fp32.
            columns: [C, K] int64.
            top: [C] fp32, see ``RowStatistics``.
            log_mass: [C] fp32, see ``RowStatistics``.
            upstream: [C, K] fp32. A row whose upstream is all 0 gets gradient 0, even if its logits are NaN.
            inverse_temperature: 1 / T.
            gradient_dtype: as in :meth:`distill`, but not None.
        """
