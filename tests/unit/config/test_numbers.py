"""Numbers of Megatron's flags, and places that torchrun gives a process: out of range is one line."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.worlds import World, prepare, refusal


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"adam_beta1": -0.1}, "--adam-beta1 -0.1: must be in [0, 1)"),
        ({"adam_beta2": 1.5}, "--adam-beta2 1.5: must be in [0, 1)"),
        ({"adam_beta2": 1.0}, "--adam-beta2 1.0: must be in [0, 1)"),
        ({"adam_eps": -1}, "--adam-eps -1.0: must be above 0"),
        ({"adam_eps": 0}, "--adam-eps 0.0: must be above 0"),
        ({"weight_decay": "nan"}, "--weight-decay nan: must be at least 0"),
        ({"weight_decay": "inf"}, "--weight-decay inf: must be at least 0"),
        ({"clip_grad": "nan"}, "--clip-grad nan: must be at least 0"),
        ({"clip_grad": -1}, "--clip-grad -1.0: must be at least 0"),
        ({"min_lr": "nan"}, "--min-lr nan: must be a finite number"),
        ({"lr_warmup_fraction": "nan"}, "--lr-warmup-fraction nan: must be a finite number"),
        ({"hidden_dropout": 1.0}, "--hidden-dropout 1.0: must be in [0, 1)"),
        ({"exit_interval": -3}, "--exit-interval -3: must be at least 1"),
        ({"exit_duration_in_mins": 0}, "--exit-duration-in-mins 0: must be at least 1"),
        ({"distributed_timeout_minutes": 0}, "--distributed-timeout-minutes 0: must be at least 1"),
        ({"seed": 10**12}, "--seed 1000000000000: must be at least 1"),
        ({"train_iters": 10**30}, f"--train-iters {10**30}: is too large"),
        ({"rollout_temperature": 1e-30}, "--rollout-temperature 1e-30: is too low for float32 log-probabilities; must"),
        ({"rollout_temperature": "inf"}, "--rollout-temperature inf: must be above 0"),
        ({"rollout_mismatch_warning": -1}, "--rollout-mismatch-warning -1.0: must be at least 0"),
        ({"recovery_steps": 10**400}, "--recovery-steps 1000"),
        ({"log_samples": 10**400}, "--log-samples 1000"),
        ({"dry_run": -2}, "--dry-run -2: must be at least 0"),
        ({"rollout_mismatch_warning": "nan"}, "--rollout-mismatch-warning nan: must be at least 0"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], line: str, world: World, tmp_path: Path) -> None:
    assert refusal(world.flags(save=tmp_path / "run", **changes)).startswith(line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--adam-beta2", "--lr", "--seed", "--general-mass-target", "--save-interval"])
def test_two_dashes_are_no_value(flag: str, world: World, tmp_path: Path) -> None:
    """Argparse takes --flag=-- for a flag with an empty list."""
    line = refusal([*world.flags(save=tmp_path / "run"), f"{flag}=--"])
    assert line == f"{flag}: has the value '--'; give one of its own"


def test_numbers_in_range(world: World, tmp_path: Path) -> None:
    sound = {"adam_beta1": 0.0, "adam_beta2": 0.999, "adam_eps": 1e-12, "clip_grad": 0, "weight_decay": 0, "seed": 1,
             "importance_high": float("inf")}  # fmt: skip
    args, _ = prepare(world.flags(save=tmp_path / "run", **sound))
    assert {name: getattr(args, name) for name in sound} == sound


@pytest.mark.parametrize(
    ("variable", "value", "least"),
    [("WORLD_SIZE", "two", 1), ("WORLD_SIZE", "0", 1), ("WORLD_SIZE", "-1", 1), ("WORLD_SIZE", "", 1),
     ("RANK", "1.5", 0), ("LOCAL_RANK", "\u0663", 0), ("RANK", "9" * 40, 0)],
)  # fmt: skip
def test_places_that_are_none(
    variable: str, value: str, least: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    line = refusal(world.flags(save=tmp_path / "run"))
    assert line == f"{variable}={value!r} in the environment: must be a whole number, {least} or more"


def test_a_rank_beyond_the_world(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    line = refusal(world.flags(save=tmp_path / "run"))
    assert line == "RANK=2 in the environment: must be below WORLD_SIZE=2"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"no_save_optim": True}, "--no-save-optim: not supported by CaMOPD training; drop the flag"),
        ({"no_load_optim": True}, "--no-load-optim: not supported by CaMOPD training; drop the flag"),
        ({"no_save_rng": True}, "--no-save-rng: not supported by CaMOPD training; drop the flag"),
        ({"no_load_rng": True}, "--no-load-rng: not supported by CaMOPD training; drop the flag"),
        ({"finetune": True}, "--finetune: not supported by CaMOPD training; drop the flag"),
        ({"non_persistent_save_interval": 5}, "--non-persistent-save-interval 5: not supported by CaMOPD training"),
        ({"dist_ckpt_strictness": "ignore_all"}, "--dist-ckpt-strictness ignore_all: would load a checkpoint in part"),
        ({"dist_ckpt_strictness": "log_all"}, "--dist-ckpt-strictness log_all: would load a checkpoint in part"),
    ],
)
def test_flags_that_would_make_a_checkpoint_useless(
    changes: dict[str, Any], line: str, world: World, tmp_path: Path
) -> None:
    assert refusal(world.flags(save=tmp_path / "run", **changes)).startswith(line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["assume_ok_unexpected", "raise_unexpected", "raise_all"])
def test_strict_loading_is_accepted(value: str, world: World, tmp_path: Path) -> None:
    assert prepare(world.flags(save=tmp_path / "run", dist_ckpt_strictness=value))


def test_a_place_outside_of_its_machine(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = refusal(world.flags(save=tmp_path / "run"))
    assert line == "LOCAL_RANK=3 in the environment: must be below LOCAL_WORLD_SIZE=2"
