"""The method that the flags ask for: the one place that knows ``--distill-method`` by name."""

from argparse import Namespace

from megatron_camopd.batch import Branch
from megatron_camopd.objective.camopd import CaMOPD
from megatron_camopd.objective.method import Method
from megatron_camopd.objective.mopd import VanillaMOPD
from megatron_camopd.objective.relaxed_opd import RelaxedOPD, reward_floor
from megatron_camopd.objective.selectkd import GreedySelecTKD, SpeculativeSelecTKD


def build_method(args: Namespace) -> Method:
    """``args``: of ``parse_arguments``. Raises ConfigurationError naming the flag whose value gives no method."""
    match args.distill_method:
        case "camopd":
            return CaMOPD(
                {Branch.GENERAL: args.general_mass_target, Branch.DOMAIN: args.domain_mass_target},
                {Branch.GENERAL: args.general_feedback_scale, Branch.DOMAIN: args.domain_feedback_scale},
                keep_unselected=args.unselected_samples == "keep",
            )
        case "mopd":
            return VanillaMOPD()
        case "relaxed-opd":
            floor = reward_floor(args.relaxed_opd_floor, args.relaxed_opd_lambda)
            return RelaxedOPD(floor, args.relaxed_opd_entropy_fraction, args.relaxed_opd_switch_step)
        case "selectkd":
            settings = {"candidates": args.selectkd_candidates, "rejected_weight": args.selectkd_rejected_weight}
            if args.selectkd_verification == "greedy":
                return GreedySelecTKD(**settings)
            return SpeculativeSelecTKD(**settings, seed=args.seed)
    raise AssertionError(args.distill_method)
