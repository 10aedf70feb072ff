"""The log-probability gap between teacher and student on the sampled tokens (Eq. 1).

    Delta_t = A_t = sg[ log pi_T(y_t | h_t) - log pi_theta(y_t | h_t) ]

One quantity, two uses: before the update it ranks samples (scores), during the update it is the advantage.
"""

from torch import Tensor


def log_prob_gap(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """Eq. 1: teacher minus student, cut off from the graph.

    Both: any shape, the same one (usually [N, R]), float, nats. Returns that shape. Raises ValueError when shapes
    differ, because a silent broadcast would compare tokens of different samples.
    """
    if teacher_logprobs.shape != student_logprobs.shape:
        raise ValueError(f"teacher {tuple(teacher_logprobs.shape)} and student {tuple(student_logprobs.shape)} differ")
    return teacher_logprobs.detach() - student_logprobs.detach()
