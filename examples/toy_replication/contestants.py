"""The contestants of the replication, with their flags, and the tables and figures that show them.

A contestant is a method with its settings. All have the same student, teachers, prompts, seeds, batch size, number of
steps and optimizer; they differ in ``flags`` and in the learning rate. The rate is chosen for each method family on
seeds and prompts of its own, because one rate for all would compare rates, not methods.
"""

from dataclasses import dataclass
from pathlib import Path

BATCH, STEPS, WARM_UP = 192, 80, 5
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 6e-4, 1e-3, 2e-3)
FIRST_RATES = (1e-4, 3e-4, 6e-4)  # of every method family; more are tried if the best is the lowest or highest
SEEDS = (1, 2, 3, 4, 5)
COMMON_RATE = 1e-4
RATE_SEEDS = (101, 102, 103)  # for the choice of learning rates; the tables do not use them
MAX_PROMPT, MAX_RESPONSE = 32, 16
CONTROL = "general-only"  # shows what the domain score loses without preservation steps
# Both branches are measured, because 5 and the schedule's period of 4 steps have no common factor.
DIAGNOSTICS = ("--gradient-diagnostics-interval", "5", "--gradient-diagnostics-samples", "64")


@dataclass(frozen=True)
class Contestant:
    """A method with its settings.

    Attributes:
        key: Name in results and folders.
        label: Name in tables and figures.
        family: Method family; its contestants have the same learning rate.
        flags: Flags that distinguish it, for ``pretrain_camopd.py``.
        tables: The tables that show it: keys of ``replication_report.TITLES``.
    """

    key: str
    label: str
    family: str
    flags: tuple[str, ...]
    tables: tuple[str, ...]


def _camopd(key: str, label: str, *tables: str, family: str = "camopd", **flags: object) -> Contestant:
    """Make a contestant with the method CaMOPD; ``flags`` are flags without dashes."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return Contestant(key, label, family, ("--distill-method", "camopd", *words), tables)


def _mixed(key: str, label: str, family: str, *tables: str, ratio: str = "1:1", method: str = "mopd") -> Contestant:
    """Make a contestant whose batches mix general and domain prompts in ``ratio``."""
    return Contestant(key, label, family, ("--distill-method", method, "--mixing-ratio", ratio), tables)


CONTESTANTS = (
    _camopd("camopd", "CaMOPD (3-1, r 2, ρ 0.8)", "1", "3", "C"),
    _mixed("mopd", "Vanilla MOPD (w/o dec 1:1)", "mopd", "1", "3", "C"),
    _mixed("relaxed-opd", "Relaxed OPD", "relaxed-opd", "1", method="relaxed-opd"),
    _mixed("selectkd", "SelecTKD (greedy)", "selectkd", "1", method="selectkd"),
    _mixed("mopd-3-1", "w/o dec (3:1)", "mopd", "3", ratio="3:1"),
    _camopd("no-selection", "w/o sel", "3", family="no-selection", unselected_samples="keep"),
    _camopd(
        "no-scale", "w/o sel, w/o scale", "3", family="no-selection",
        unselected_samples="keep", general_feedback_scale=1,
    ),
    _camopd(CONTROL, "Control: CaMOPD's general steps alone", "1", preservation_steps=0),
    _camopd("schedule-1-1", "1-1, r 2, ρ 0.8", "C", recovery_steps=1),
    _camopd("schedule-5-1", "5-1, r 2, ρ 0.8", "C", recovery_steps=5),
    *(
        _camopd(
            f"scale-{scale}-mass-{mass}", f"3-1, r {scale}, ρ {mass}", "C",
            general_feedback_scale=scale, general_mass_target=mass,
        )
        for scale in (1, 2, 3) for mass in (0.6, 0.8) if (scale, mass) != (2, 0.8)
    ),
)  # fmt: skip
BY_KEY = {contestant.key: contestant for contestant in CONTESTANTS}
DIAGNOSED = ("camopd", "mopd")  # with gradient diagnostics, which do not change the training
FAMILIES = tuple(dict.fromkeys(contestant.family for contestant in CONTESTANTS))
# Models that are scored without training.
REFERENCES = {"general": "General teacher", "specialist": "Specialist (student at the start, domain teacher)"}


@dataclass(frozen=True)
class Budget:
    """Size of the replication; ``QUICK`` only shows that every part works."""

    batch: int
    steps: int
    seeds: tuple[int, ...]
    rate_seeds: tuple[int, ...]
    first_rates: tuple[float, ...]
    contestants: tuple[str, ...]
    common_rate: float | None  # learning rate of the additional comparison at one rate for all


FULL = Budget(BATCH, STEPS, SEEDS, RATE_SEEDS, FIRST_RATES, tuple(BY_KEY), COMMON_RATE)
QUICK = Budget(32, 6, (1, 2), (), (3e-4,), ("camopd", "mopd", "relaxed-opd", "selectkd", "no-selection"), None)


def run_flags(
    contestant: Contestant, budget: Budget, *, learning_rate: float, seed: int, inputs: Path, save: Path
) -> list[str]:
    """Return the command line of one run of ``pretrain_camopd.py``; ``inputs`` is that of ``replicate.Replication``."""
    settings = {
        "load": inputs / "megatron" / "specialist",
        "general-teacher-load": inputs / "megatron" / "general",
        "save": save,
        "general-prompts": inputs / "prompts" / "general_prompts.jsonl",
        "domain-prompts": inputs / "prompts" / "domain_prompts.jsonl",
        "max-prompt-length": MAX_PROMPT,
        "max-response-length": MAX_RESPONSE,
        "global-batch-size": budget.batch,
        "micro-batch-size": 32,
        "rollout-batch-size": 256,
        "train-iters": budget.steps,
        "lr": learning_rate,
        "lr-warmup-iters": WARM_UP,
        "weight-decay": 0,
        "clip-grad": 1.0,
        "seed": seed,
        "save-interval": 1000,  # never: a run is short, and an interrupted one starts again
    }
    line = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    diagnosed = DIAGNOSTICS if contestant.key in DIAGNOSED and budget is FULL else ()
    if contestant.key in DIAGNOSED and budget is QUICK:
        diagnosed = ("--gradient-diagnostics-interval", "3", "--gradient-diagnostics-samples", "8")
    return [*line, *contestant.flags, *diagnosed]
