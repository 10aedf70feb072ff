"""The token budget of micro-batches and context parallelism: defaults, and values that cannot work."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.model.packing import PackingRule, PackingSettings
from tests.support.worlds import World, prepare, refusal

LONGEST = 64  # prompt and response of the world's command line


@pytest.mark.parametrize(
    ("changes", "tokens", "note"),
    [
        ({"micro_batch_size": None}, LONGEST, None),
        ({"micro_batch_size": 3, "global_batch_size": 6}, 3 * LONGEST, "3 x --seq-length"),
        ({"micro_batch_size": 2, "max_tokens_per_microbatch": LONGEST}, LONGEST, str(LONGEST)),
        ({"micro_batch_size": None, "max_tokens_per_microbatch": 1000}, 1000, None),
        ({"micro_batch_size": None, "seq_length": 100}, 100, None),
    ],
)
def test_limits(changes: dict[str, Any], tokens: int, note: str | None, world: World, tmp_path: Path) -> None:
    args, _ = prepare(world.flags(save=tmp_path / "run", **changes))
    assert args.max_tokens_per_microbatch == tokens
    size = changes["micro_batch_size"]
    expected = f"--micro-batch-size {size}: microbatches are packed by tokens, up to --max-tokens-per-microbatch {note}"
    assert args.micro_batch_note == (None if note is None else expected)


@pytest.mark.parametrize(
    ("tokens", "layout", "multiple", "most"),
    [
        (36864, {}, 4608, 36864),
        (1000, {}, 125, 1000),
        (5, {}, 1, 5),
        (1001, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 128, 1024),
        (36865, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 4}, 4616, 36928),
    ],
)
def test_lengths_on_a_gpu_are_few(
    tokens: int, layout: dict[str, Any], multiple: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight lengths at most, each of which the layout can divide, and none much above the limit."""
    device = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr("megatron_camopd.model.packing.accelerator.current", lambda: device)
    args = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
            "expert_model_parallel_size": 1, "sequence_parallel": False, "world_size": 8,
            "max_tokens_per_microbatch": tokens}  # fmt: skip
    rule = PackingRule.of(Namespace(**args | layout), context_rank=0)
    assert (rule.total_multiple, rule.max_tokens) == (multiple, most)
    assert len({rule.padded_total(length) for length in range(1, most + 1)}) <= 8


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


def test_transformer_engine_in_float32_is_refused() -> None:
    args = Namespace(
        transformer_impl="transformer_engine", bf16=False, fp16=False, seq_length=8, max_tokens_per_microbatch=None,
        micro_batch_note=None,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="takes packed sequences in bf16 and fp16 alone; add --bf16, or give"):
        PackingSettings.check_run(args)
    args.bf16 = True
    PackingSettings.check_run(args)
    assert args.max_tokens_per_microbatch == 8


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
