"""Settings that several stages share: the choice of the stage, and the limit of skipped steps."""

from dataclasses import dataclass

from megatron_camopd.config.settings import Settings, at_least, setting


@dataclass(frozen=True, kw_only=True)
class StageSettings(Settings):
    """CaMOPD stage: what this command does."""

    stage: str = setting("distill", kept=True)
    """distill: on-policy distillation; sft: supervised fine-tuning on --conversations; generate: responses of --load
    to --prompts, as conversations"""

    dry_run: int | None = setting(None, within=at_least(0), nargs="?", const=0, metavar="PROCESSES")
    """check everything, print the plan for so many processes (default: those that torchrun started) and stop; needs
    no GPU"""


@dataclass(frozen=True, kw_only=True)
class SafetySettings(Settings):
    """CaMOPD safety: when training gives up."""

    max_skipped_steps: int = setting(5, within=at_least(1))
    """stop after this many steps in a row with non-finite loss or gradients, counted over all steps and over those of
    each branch; also when half of the last 4 times as many steps of a branch were such"""
