"""The token budget of micro-batches and context parallelism: defaults, and values that cannot work."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import World, prepare, refusal

LONGEST = 64  # prompt and response of the world's command line


@pytest.mark.parametrize(
    ("changes", "tokens", "sequences"),
    [
        ({"micro_batch_size": None}, LONGEST, None),
        ({"micro_batch_size": 3, "global_batch_size": 6}, 3 * LONGEST, 3),
        ({"micro_batch_size": 2, "max_tokens_per_microbatch": LONGEST}, LONGEST, 2),
        ({"micro_batch_size": None, "max_tokens_per_microbatch": 1000}, 1000, None),
        ({"micro_batch_size": None, "seq_length": 100}, 100, None),
    ],
)
def test_limits(changes: dict[str, Any], tokens: int, sequences: int | None, world: World, tmp_path: Path) -> None:
    args, _ = prepare(world.flags(save=tmp_path / "run", **changes))
    assert (args.max_tokens_per_microbatch, args.max_sequences_per_microbatch) == (tokens, sequences)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens_per_microbatch": LONGEST - 1},
         f"--max-tokens-per-microbatch {LONGEST - 1}: must be at least {LONGEST}, the length of the longest sequence"),
        ({"max_tokens_per_microbatch": 0}, "--max-tokens-per-microbatch 0: must be at least 1"),
        ({"context_parallel_size": 0}, "--context-parallel-size 0: must be at least 1"),
        ({"context_parallel_size": 2},
         "--tensor-model-parallel-size 1 x --pipeline-model-parallel-size 1 x --context-parallel-size 2 = 2 does not "
         "divide the 1 processes"),
        ({"context_parallel_size": 2, "cp_comm_type": "a2a", "dry_run": 2},
         "--cp-comm-type a2a: not supported by CaMOPD training; must be one of p2p, all_gather"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel: not supported by CaMOPD training"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(changes: dict[str, Any], words: str, world: World, tmp_path: Path) -> None:
    assert refusal(world.flags(save=tmp_path / "run", **changes)).startswith(words)


@pytest.mark.parametrize("length", [63, 64, 65])
def test_no_length_is_refused_under_context_parallelism(length: int, world: World, tmp_path: Path) -> None:
    """Megatron wants multiples of twice the size; sequences are padded to that when they are packed."""
    line = world.flags(save=tmp_path / "run", context_parallel_size=2, dry_run=2, max_response_length=length - 40)
    args, _ = prepare(line)
    assert args.seq_length == length and args.context_parallel_size == 2
    from megatron_camopd.stages.registry import describe_stage

    assert "processes: 2 = tensor 1 x pipeline 1 x context 2 x data 1" in describe_stage(args, prepare(line)[1])


def test_the_native_engine_cannot_decode_with_transformer_engine_and_context_parallelism() -> None:
    from megatron_camopd.rollout.megatron_engine import MegatronEngineSettings

    args = Namespace(context_parallel_size=2, transformer_impl="transformer_engine")
    with pytest.raises(ConfigurationError) as caught:
        MegatronEngineSettings.check_run(args)
    assert str(caught.value) == (
        "--rollout-engine megatron: Transformer Engine's attention cannot decode with --context-parallel-size 2; use "
        "--rollout-engine vllm"
    )
    MegatronEngineSettings.check_run(Namespace(context_parallel_size=2, transformer_impl="local"))
    MegatronEngineSettings.check_run(Namespace(context_parallel_size=1, transformer_impl="transformer_engine"))
