"""The objective of CaMOPD as small pure functions: gap, scores, selection, importance weights, coefficients, loss.

The modules need torch and no Megatron. In the order of a training step they are :mod:`gap`, :mod:`scores`,
:mod:`selection`, :mod:`weights` and :mod:`importance`. :mod:`loss` writes the whole objective as one readable formula;
training runs the same formula fused into the output head (``megatron_camopd.kernels.distill_head``), and tests compare
the two.

The values of ``--distill-method`` are :mod:`camopd`, :mod:`mopd`, :mod:`relaxed_opd` and :mod:`selectkd`. Each
implements the interface in :mod:`method`.
"""

from megatron_camopd.objective.gap import log_prob_gap
from megatron_camopd.objective.importance import importance_weights, outside_bounds
from megatron_camopd.objective.loss import camopd_loss
from megatron_camopd.objective.scores import gap_scores
from megatron_camopd.objective.selection import select_by_gap_mass
from megatron_camopd.objective.weights import mean_coefficients, sample_coefficients

__all__ = [
    "camopd_loss",
    "gap_scores",
    "importance_weights",
    "log_prob_gap",
    "mean_coefficients",
    "outside_bounds",
    "sample_coefficients",
    "select_by_gap_mass",
]
