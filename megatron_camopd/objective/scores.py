"""Scores that rank the samples of a branch by the gap between teacher and student (Eq. 4 and 5).

    general   s_g(x_i) = (1 / L_i) sum_t |Delta_{i,t}|          counts disagreement in both directions
    domain    s_d(x_i) = (1 / L_i) sum_t max(Delta_{i,t}, 0)    counts tokens that the student now finds less likely

Sums run in float64 over response tokens. L_i is max(number of response tokens, 1), so an empty response has score 0.
"""

from torch import Tensor

from megatron_camopd.schedule import Branch, ScoreRule


def gap_scores(gap: Tensor, mask: Tensor, branch: Branch | ScoreRule) -> Tensor:
    """Return one score per sample by the rule of the branch.

    Args:
        gap: [N, R] float, nats, from :func:`log_prob_gap`; values outside ``mask`` have no effect, NaN included.
        mask: [N, R] bool (or 0/1), True on response tokens.
        branch: ``Branch.GENERAL`` or ``ScoreRule.ABSOLUTE`` for Eq. 4, ``Branch.DOMAIN`` or ``ScoreRule.POSITIVE`` for
            Eq. 5.

    Returns:
        [N] float64, nats per token.

    Raises:
        ValueError: The shapes differ, or ``branch`` is neither a :class:`Branch` nor a :class:`ScoreRule`.
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
