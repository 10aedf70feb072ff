"""The objective of CaMOPD as small pure functions: gap, scores, selection, importance weights, coefficients, loss.

Only torch is needed. Read in the order of a step: :mod:`gap`, :mod:`scores`, :mod:`selection`, :mod:`weights`,
:mod:`importance`, and :mod:`loss` for the whole as one readable formula (training runs the same formula fused into the
output head, ``megatron_camopd.kernels.distill_head``; tests hold the two together).

The values of ``--distill-method`` are :mod:`camopd`, :mod:`mopd`, :mod:`relaxed_opd` and :mod:`selectkd`, all behind
the interface of :mod:`method`.
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
