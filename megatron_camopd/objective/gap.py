"""The log-probability gap between teacher and student on the sampled tokens (Eq. 1).

    Delta_t = A_t = sg[ log pi_T(y_t | h_t) - log pi_theta(y_t | h_t) ]

The gap is used twice: before the update its scores rank the samples, and in the update it is the advantage.
"""

from torch import Tensor


def log_prob_gap(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """Return the gap of Eq. 1, teacher minus student, detached from the autograd graph.

    Args:
        teacher_logprobs: Any shape, usually [N, R], float, nats.
        student_logprobs: The same shape, float, nats.

    Returns:
        The gap in that shape, nats.

    Raises:
        ValueError: The shapes differ. Broadcasting would compare tokens of different samples.
    """
    if teacher_logprobs.shape != student_logprobs.shape:
        raise ValueError(f"teacher {tuple(teacher_logprobs.shape)} and student {tuple(student_logprobs.shape)} differ")
    return teacher_logprobs.detach() - student_logprobs.detach()
