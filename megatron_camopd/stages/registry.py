"""What each ``--stage`` is made of: the one place that knows their names."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_camopd.stages.distill.plan import plan_run
from megatron_camopd.stages.distill.runner import Trainer
from megatron_camopd.stages.generate.plan import plan_responses
from megatron_camopd.stages.generate.runner import ResponseGenerator
from megatron_camopd.stages.sft.plan import plan_sft
from megatron_camopd.stages.sft.runner import SftTrainer

_PLANS: dict[str, Callable[[Namespace], Any]] = {"distill": plan_run, "sft": plan_sft, "generate": plan_responses}


def plan_stage(args: Namespace) -> Any:
    """Read and check the stage's inputs. Errors: ConfigurationError naming the flag or file."""
    return _PLANS[args.stage](args)


def run_stage(args: Namespace, plan: Any) -> None:
    """Do what the stage does, to its end; collective."""
    _RUNS[args.stage](args, plan)


_RUNS: dict[str, Callable[[Namespace, Any], None]] = {
    "distill": lambda args, plan: Trainer(args, plan).train(),
    "sft": lambda args, plan: SftTrainer(args, plan).train(),
    "generate": lambda args, plan: ResponseGenerator(args, plan).run(),
}
