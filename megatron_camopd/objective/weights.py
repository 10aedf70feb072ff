"""Per-sample coefficients c_i: what makes one method's loss differ from another's.

    L = - sum_i c_i sum_t w_{i,t} A_{i,t} log pi_theta(y_{i,t} | h)

    CaMOPD (Eq. 7)         c_i = r_b / (|S_b| L_i)   for selected samples, 0 for the others
    without selection      c_i = r_i / (N L_i)       r_i = r_b for selected samples, 1 for the others
    Vanilla MOPD (Eq. 2)   c_i = 1 / (N L_i)         for every sample of the pooled batch

Coefficients are made once, for the whole global batch, and then handed out with the samples: |S_b| and N count over all
ranks. That is also why the fused head can finish gradients in its forward pass.
"""

import torch
from torch import Tensor


def sample_coefficients(scores: Tensor, selected: Tensor, response_lengths: Tensor, feedback_scale: float) -> Tensor:
    """CaMOPD's coefficients, c_i = r_b / (|S_b| max(L_i, 1)) for i in S_b, else 0.

    scores: [N] float, of :func:`gap_scores`; selected: [N] bool, of :func:`select_by_gap_mass`; response_lengths: [N]
    int64, tokens; feedback_scale: r_b. All over the global batch. A selected sample without any unmasked token still
    counts in |S_b|. When all scores are 0 (the student is its own domain teacher, before any update) all coefficients
    are 0, so loss and gradient are exactly zero. Returns [N] float32.
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
    """Every sample trained, the selected ones r_b times as strongly: c_i = r_i / (N max(L_i, 1)).

    Arguments and the rule for scores that are all 0 as for :func:`sample_coefficients`. Returns [N] float32.
    """
    strength = torch.where(selected.bool(), feedback_scale, 1.0) * bool((scores != 0).any())
    return (strength * mean_coefficients(response_lengths).double()).float()


def mean_coefficients(response_lengths: Tensor) -> Tensor:
    """Vanilla MOPD's coefficients: the mean over samples of the mean over tokens, c_i = 1 / (N max(L_i, 1)).

    response_lengths: [N] int64, tokens, of the whole pooled batch. Returns [N] float32.
    """
    lengths = response_lengths.clamp(min=1).double()
    return (1.0 / (max(lengths.numel(), 1) * lengths)).float()
