"""The CaMOPD loss of one branch as a readable reference (Eq. 7).

    L_b = - (1 / |S_b|) sum_{i in S_b} (1 / L_i) sum_t w_{i,t} r_b A_{i,t} log pi_theta(y_{i,t} | h)

A and w are stop-gradients, so the gradient is that of a weighted log-likelihood. It needs log-probabilities as [N, R]
tensors; training computes the same inside the output head (``megatron_camopd.kernels.distill_head``), where they never
leave the row kernel.
"""

from torch import Tensor

from megatron_camopd.objective.gap import log_prob_gap
from megatron_camopd.objective.importance import importance_weights


def camopd_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    selected: Tensor,
    feedback_scale: float,
    *,
    importance: tuple[str, float, float] = ("mask", 0.5, 5.0),
) -> Tensor:
    """Eq. 7 over a whole global batch; differentiable in ``student_logprobs``.

    student_logprobs, teacher_logprobs, rollout_logprobs: [N, R] float, nats; values outside the mask are never read.
    mask: [N, R] bool, response tokens. selected: [N] bool, S_b; with none selected the loss is 0. feedback_scale: r_b.
    importance: (mode, low, high) of :func:`importance_weights`. Returns a scalar, in the dtype of ``student_logprobs``.

    L_i = max(number of masked-in tokens, 1); a selected sample without any still counts in |S_b|. The rule for "all
    scores are 0" lives in :func:`sample_coefficients`: with such a batch, pass ``feedback_scale=0.0``.
    """
    mask = mask.bool()
    used = mask & selected.bool()[:, None]
    # Padding may hold anything, NaN included: replace it before any product, for 0 * NaN is NaN.
    student = student_logprobs.masked_fill(~used, 0.0)
    advantage = log_prob_gap(teacher_logprobs.masked_fill(~used, 0.0), student)
    weight = importance_weights(student, rollout_logprobs.masked_fill(~used, 0.0), *importance)
    # A token that the importance weight drops is dropped whole, also when its advantage is infinite.
    feedback = (weight * feedback_scale * advantage).masked_fill(weight == 0.0, 0.0)
    terms = feedback * student.masked_fill(weight == 0.0, 0.0)
    lengths = mask.sum(dim=1).clamp(min=1)
    return -(terms.sum(dim=1) / lengths).sum() / selected.sum().clamp(min=1)
