"""The registry of stages: settings, checks, plan, run and dry-run description behind each value of ``--stage``."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_camopd.config.branch_settings import BranchSettings
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.data.chat import PromptSettings
from megatron_camopd.diagnostics.gradients import DiagnosticsSettings
from megatron_camopd.objective.importance import ImportanceSettings
from megatron_camopd.objective.registry import METHODS
from megatron_camopd.rollout.registry import ENGINES
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.stages.distill import plan as distill_plan
from megatron_camopd.stages.distill.runner import DistillRunner
from megatron_camopd.stages.distill.samples import SampleSettings
from megatron_camopd.stages.distill.settings import DistillSettings
from megatron_camopd.stages.generate import plan as generate_plan
from megatron_camopd.stages.generate.runner import GenerateRunner
from megatron_camopd.stages.generate.settings import GenerationSettings
from megatron_camopd.stages.settings import SafetySettings
from megatron_camopd.stages.sft import plan as sft_plan
from megatron_camopd.stages.sft.runner import SftRunner
from megatron_camopd.stages.sft.settings import SftSettings
from megatron_camopd.stages.stage import Stage

_METHODS = tuple(dict.fromkeys(cls for method in METHODS.values() for cls in method.settings))
_ENGINES = tuple(dict.fromkeys(cls for engine in ENGINES.values() for cls in engine.settings))
_ROLLOUTS = (PromptSettings, SamplingSettings, RolloutSettings, *_ENGINES)


def _lock_of_run(args: Namespace) -> tuple[Path, str]:
    return Path(args.save) / "run.lock", f"--save {args.save}"


STAGES: dict[str, Stage] = {
    "distill": Stage(
        settings=(
            DistillSettings, BranchSettings, *_METHODS, ImportanceSettings, *_ROLLOUTS, DiagnosticsSettings,
            SampleSettings, SafetySettings,
        ),
        check=distill_plan.check_arguments,
        plan=distill_plan.plan_distillation,
        run=lambda args, plan: DistillRunner(args, plan).run(),
        describe=distill_plan.describe,
        lock=_lock_of_run,
    ),
    "sft": Stage(
        settings=(SftSettings, SafetySettings),
        check=sft_plan.check_arguments,
        plan=sft_plan.plan_sft,
        run=lambda args, plan: SftRunner(args, plan).run(),
        describe=sft_plan.describe,
        lock=_lock_of_run,
        kept_megatron_flags=("seq_length",),
    ),
    "generate": Stage(
        settings=(GenerationSettings, *_ROLLOUTS),
        check=generate_plan.check_arguments,
        plan=generate_plan.plan_responses,
        run=lambda args, plan: GenerateRunner(args, plan).run(),
        describe=generate_plan.describe,
        lock=generate_plan.lock,
        unused_megatron_flags=("save",),
    ),
}  # fmt: skip


def plan_stage(args: Namespace) -> Any:
    """Read and check the inputs of the stage that ``args`` ask for.

    Raises:
        ConfigurationError: Names the flag or file.
    """
    return STAGES[args.stage].plan(args)


def run_stage(args: Namespace, plan: Any) -> None:
    """Run the stage to its end; collective."""
    STAGES[args.stage].run(args, plan)


def describe_stage(args: Namespace, plan: Any) -> str:
    """Return the text that ``--dry-run`` prints about the plan of a run."""
    lines = [f"stage: {args.stage}", *STAGES[args.stage].describe(args, plan)]
    return "\n".join([*lines, "dry run: nothing was started or written"])
