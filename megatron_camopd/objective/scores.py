"""Scores that rank the samples of a branch by how much the teacher has to say about them (Eq. 4 and 5).

    general   s_g(x_i) = (1 / L_i) sum_t |Delta_{i,t}|          any disagreement is something to recover
    domain    s_d(x_i) = (1 / L_i) sum_t max(Delta_{i,t}, 0)    only what the student now likes less than it did

Sums run in float64 and on masked-in tokens alone; L_i = max(number of masked-in tokens, 1), so an empty response scores
0.
"""

from torch import Tensor

from megatron_camopd.schedule import Branch, ScoreRule


def gap_scores(gap: Tensor, mask: Tensor, branch: Branch | ScoreRule) -> Tensor:
    """Return Eq. 4 (``Branch.GENERAL``, ``ScoreRule.ABSOLUTE``) or Eq. 5 (the others), one score a sample.

    gap: [N, R] float, nats, of :func:`log_prob_gap`; values outside the mask are never read, NaN included.
    mask: [N, R] bool (or 0/1), True on response tokens. Returns [N] float64, nats a token.
    Raises ValueError when shapes differ or ``branch`` is neither a :class:`Branch` nor a :class:`ScoreRule`.
    """
    if gap.shape != mask.shape:
        raise ValueError(f"gap {tuple(gap.shape)} and mask {tuple(mask.shape)} differ")
    mask = mask.bool()
    tokens = gap.detach().double().masked_fill(~mask, 0.0)
    rule = branch.score if isinstance(branch, Branch) else branch
    if rule is ScoreRule.ABSOLUTE:
        tokens = tokens.abs()
    elif rule is ScoreRule.POSITIVE:
        tokens = tokens.clamp(min=0.0)
    else:
        raise ValueError(f"branch is {branch!r}; it must be Branch.GENERAL or Branch.DOMAIN, or a ScoreRule")
    return tokens.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
