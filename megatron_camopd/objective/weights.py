"""Coefficients c_i of the samples, in which the losses of the methods differ.

    L = - sum_i c_i sum_t w_{i,t} A_{i,t} log pi_theta(y_{i,t} | h)

    CaMOPD (Eq. 7)         c_i = r_b / (|S_b| L_i)   for selected samples, 0 for the others
    without selection      c_i = r_i / (N L_i)       r_i = r_b for selected samples, 1 for the others
    Vanilla MOPD (Eq. 2)   c_i = 1 / (N L_i)         for every sample of the pooled batch

Coefficients are computed once for the whole global batch, before its samples are divided among the ranks, so |S_b| and
N count the samples of all ranks. Because coefficients are known before the forward pass, the fused output head can
compute its gradients in that pass.
"""

import torch
from torch import Tensor


def sample_coefficients(scores: Tensor, selected: Tensor, response_lengths: Tensor, feedback_scale: float) -> Tensor:
    """Return the coefficients of CaMOPD: c_i = r_b / (|S_b| max(L_i, 1)) for i in S_b, else 0.

    A selected sample with an empty response still counts in |S_b|. If all scores are 0 (the student is its own domain
    teacher, before any update), all coefficients are 0, so loss and gradient are exactly zero.

    Args:
        scores: [N] float, from :func:`gap_scores`, of the whole global batch.
        selected: [N] bool, from :func:`select_by_gap_mass`.
        response_lengths: [N] int64, tokens.
        feedback_scale: r_b.

    Returns:
        [N] float32.
    """
    selected = selected.bool()
    if not bool((scores != 0).any()):
        return torch.zeros(selected.shape, dtype=torch.float32, device=selected.device)
    lengths = response_lengths.clamp(min=1).double()
    count = selected.sum().clamp(min=1)
    return torch.where(selected, feedback_scale / (count * lengths), 0.0).float()


def emphasized_coefficients(
    scores: Tensor, selected: Tensor, response_lengths: Tensor, feedback_scale: float
) -> Tensor:
    """Return coefficients that train all samples: c_i = r_i / (N max(L_i, 1)), r_i = r_b if selected, else 1.

    The arguments, the result and the rule for scores that are all 0 are those of :func:`sample_coefficients`.
    """
    strength = torch.where(selected.bool(), feedback_scale, 1.0) * bool((scores != 0).any())
    return (strength * mean_coefficients(response_lengths).double()).float()


def mean_coefficients(response_lengths: Tensor) -> Tensor:
    """Return the coefficients of Vanilla MOPD: c_i = 1 / (N max(L_i, 1)), a mean over samples of token means.

    Args:
        response_lengths: [N] int64, tokens, of the whole pooled batch.

    Returns:
        [N] float32.
    """
    lengths = response_lengths.clamp(min=1).double()
    return (1.0 / (max(lengths.numel(), 1) * lengths)).float()
