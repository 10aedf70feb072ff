"""The flags of the rollout engines: each engine's are its own, in range, and sizes are written as people write them.

None of it needs vLLM: a command line is refused before any engine is imported, and that it is installed is pretended.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.config.byte_size import parse_size
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator
from tests.support.worlds import World, prepare, refusal

VLLM_FLAGS: dict[str, Any] = {
    "--rollout-tensor-parallel-size": 1,
    "--rollout-max-sequences": 8,
    "--rollout-memory-share": 0.4,
    "--rollout-kv-cache-bytes": "1GiB",
    "--rollout-enforce-eager": None,
    "--rollout-prefix-caching": None,
    "--no-rollout-prefix-caching": None,
    "--rollout-sleep": None,
    "--no-rollout-sleep": None,
    "--rollout-time-limit": 60,
    "--weight-sync-bucket-size": "64MiB",
    "--rollout-probe-interval": 5,
}


def engine_flags(engine: str) -> tuple[str, ...]:
    """Argument names that one engine alone reads."""
    accelerator.activate()  # before Megatron is imported
    from megatron_camopd.rollout.registry import ENGINES

    return tuple(name for cls in ENGINES[engine].settings for name in cls.argument_names())


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of packages that seem to be installed, or not if taken out, whatever is."""
    names, find_spec = {"vllm"}, importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        if name == "vllm":
            return object() if name in names else None
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return names


def refused(world: World, save: Path, *extra: Any, **changes: Any) -> str:
    """The line with which the world's command line with these changes is refused; nothing was written."""
    line = refusal([*world.flags(save=save, **changes), *map(str, extra)])
    assert not save.exists()
    return line


def test_every_flag_of_an_engine_is_tried_here() -> None:
    tried = {flag.removeprefix("--no-").removeprefix("--").replace("-", "_") for flag in VLLM_FLAGS}
    assert tried == set(engine_flags("vllm"))
    assert engine_flags("megatron") == ("rollout_batch_size",)


@pytest.mark.parametrize("engine", [None, "megatron"])
@pytest.mark.parametrize(("flag", "value"), VLLM_FLAGS.items())
def test_flags_of_vllm_are_refused_for_the_native_engine(
    flag: str, value: Any, engine: str | None, world: World, tmp_path: Path
) -> None:
    words = [flag] if value is None else [flag, value]
    line = refused(world, tmp_path / "run", *words, rollout_engine=engine)
    assert line == f"{flag}: has no effect with --rollout-engine megatron; drop one of the two"


def test_flags_of_the_native_engine_are_refused_for_vllm(world: World, tmp_path: Path) -> None:
    line = refused(world, tmp_path / "run", "--rollout-batch-size=64", rollout_engine="vllm")
    assert line == "--rollout-batch-size: has no effect with --rollout-engine vllm; drop one of the two"


def test_vllm_that_is_not_installed(installed: set[str], world: World, tmp_path: Path) -> None:
    installed.clear()
    line = refused(world, tmp_path / "run", rollout_engine="vllm")
    assert line == "--rollout-engine vllm: vllm is not installed; run `make setup EXTRAS=vllm`"


def test_an_unknown_engine(world: World, tmp_path: Path) -> None:
    line = refused(world, tmp_path / "run", rollout_engine="sglang")
    assert line.startswith("argument --rollout-engine: invalid choice: 'sglang'")
    assert "megatron" in line and "vllm" in line


def test_the_flags_of_vllm_arrive(world: World, tmp_path: Path) -> None:
    """Sizes in bytes, switches on and off; without them the defaults."""
    words = [str(word) for flag, value in VLLM_FLAGS.items() for word in (flag, value) if word is not None]
    args, _ = prepare([*world.flags(save=tmp_path / "run", rollout_engine="vllm"), *words])
    found = {name: getattr(args, name) for name in engine_flags("vllm")}
    assert found == {
        "rollout_tensor_parallel_size": 1, "rollout_max_sequences": 8, "rollout_memory_share": 0.4,
        "rollout_kv_cache_bytes": 2**30, "rollout_enforce_eager": True, "rollout_prefix_caching": False,
        "rollout_sleep": False, "rollout_time_limit": 60.0, "weight_sync_bucket_size": 64 * 2**20,
        "rollout_probe_interval": 5,
    }  # fmt: skip
    args, _ = prepare(world.flags(save=tmp_path / "run", rollout_engine="vllm"))
    assert args.weight_sync_bucket_size == 512 * 2**20 and args.rollout_kv_cache_bytes is None
    assert args.rollout_prefix_caching and args.rollout_sleep and not args.rollout_enforce_eager
    assert args.rollout_time_limit == 0.0 and args.rollout_probe_interval == 20


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        *[("rollout_memory_share", value, "must be between 0 and 1") for value in ("0.0", "1.0", "-0.5", "nan", "8.0")],
        *[(name, "0", "must be at least 1") for name in ("rollout_tensor_parallel_size", "rollout_max_sequences")],
        ("rollout_tensor_parallel_size", "-2", "must be at least 1"),
        ("rollout_probe_interval", "-1", "must be at least 0"),
        *[("rollout_time_limit", value, "must be at least 0") for value in ("-1.0", "nan")],
    ],
)
def test_numbers_out_of_range(name: str, value: str, right: str, world: World, tmp_path: Path) -> None:
    line = refused(world, tmp_path / "run", rollout_engine="vllm", **{name: value})
    assert line == f"--{name.replace('_', '-')} {value}: {right}"


@pytest.mark.parametrize(("world_size", "size"), [(1, 2), (4, 3), (2, 4)])
def test_engines_share_the_processes_evenly(
    world_size: int, size: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    line = refused(world, tmp_path / "run", rollout_engine="vllm", rollout_tensor_parallel_size=size)
    assert line == f"--rollout-tensor-parallel-size {size}: must divide the {world_size} processes"


@pytest.mark.parametrize("text", ["x", "", "8 Gig", "-1GiB", "0", "0.5", "1e9", "GiB", "1,5GB", "nan", "inf"])
@pytest.mark.parametrize("flag", ["--rollout-kv-cache-bytes", "--weight-sync-bucket-size"])
def test_what_is_no_size(flag: str, text: str, world: World, tmp_path: Path) -> None:
    line = refused(world, tmp_path / "run", f"{flag}={text}", rollout_engine="vllm")
    assert line == f"argument {flag}: {text!r}: is no size; expected for example 4GB, 500MB or 2GiB"
    with pytest.raises(ConfigurationError, match=f"^--flag '{text}': is no size"):
        parse_size(text, flag="--flag")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30), ("8gib", 8 * 2**30), ("8GB", 8 * 10**9), ("1.5 MiB", 3 * 2**19), ("500MB", 500_000_000),
        (" 64 KiB ", 65536), ("64KB", 64_000), ("1", 1), ("4096", 4096), ("0.001kb", 1),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_size(text, flag="--flag") == expected
