"""The CaMOPD loss of one branch as a readable reference (Eq. 7).

    L_b = - (1 / |S_b|) sum_{i in S_b} (1 / L_i) sum_t w_{i,t} r_b A_{i,t} log pi_theta(y_{i,t} | h)

A and w are stop-gradients, so the gradient is that of a weighted log-likelihood. This function takes log-probabilities
as [N, R] tensors. Training computes the same loss inside the output head (``megatron_camopd.kernels.distill_head``),
where log-probabilities do not leave the row kernel.
"""

from torch import Tensor

from megatron_camopd.objective.gap import log_prob_gap
from megatron_camopd.objective.importance import DEFAULT_IMPORTANCE, importance_weights


def camopd_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    selected: Tensor,
    feedback_scale: float,
    *,
    importance: tuple[str, float, float] = DEFAULT_IMPORTANCE,
) -> Tensor:
    """Return the loss of Eq. 7 over a whole global batch, differentiable in ``student_logprobs``.

    L_i is max(number of response tokens, 1). A selected sample without response tokens still counts in |S_b|. For a
    batch whose scores are all 0, :func:`sample_coefficients` gives zero coefficients; here, pass
    ``feedback_scale=0.0`` for such a batch.

    Args:
        student_logprobs: [N, R] float, nats; values outside ``mask`` have no effect.
        teacher_logprobs: [N, R] float, nats; values outside ``mask`` have no effect.
        rollout_logprobs: [N, R] float, nats; values outside ``mask`` have no effect.
        mask: [N, R] bool, True on response tokens.
        selected: [N] bool, the set S_b; if it is empty the loss is 0.
        feedback_scale: r_b.
        importance: (mode, low, high) of :func:`importance_weights`.

    Returns:
        The loss, a scalar in the dtype of ``student_logprobs``.
    """
    mask = mask.bool()
    used = mask & selected.bool()[:, None]
    # Padding may hold any value, NaN included. Replace it before multiplying, because 0 * NaN is NaN.
    student = student_logprobs.masked_fill(~used, 0.0)
    advantage = log_prob_gap(teacher_logprobs.masked_fill(~used, 0.0), student)
    weight = importance_weights(student, rollout_logprobs.masked_fill(~used, 0.0), *importance)
    # A token with importance weight 0 must add 0 even if its advantage is infinite, because 0 * inf is NaN.
    feedback = (weight * feedback_scale * advantage).masked_fill(weight == 0.0, 0.0)
    terms = feedback * student.masked_fill(weight == 0.0, 0.0)
    lengths = mask.sum(dim=1).clamp(min=1)
    return -(terms.sum(dim=1) / lengths).sum() / selected.sum().clamp(min=1)
