"""``--stage``: which flags belong to which stage, and what each stage needs."""

from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import LayoutSizes
from tests.support.method_flags import VALUES as METHOD_VALUES
from tests.support.worlds import World, prepare, refusal

# One value for every argument that some stages do not read.
VALUES: dict[str, Any] = METHOD_VALUES | {
    "distill_method": "mopd", "importance_correction": "clip", "importance_low": 0.1, "importance_high": 9.0,
    "general_teacher_load": "x", "domain_teacher_load": "x", "general_prompts": "x", "domain_prompts": "x",
    "rollout_mismatch_warning": 1.0, "gradient_diagnostics_interval": 1, "gradient_diagnostics_samples": 1,
    "max_prompt_length": 9, "max_response_length": 9, "overlong_prompts": "skip", "rollout_engine": "vllm",
    "rollout_temperature": 0.5, "rollout_batch_size": 2, "rollout_tensor_parallel_size": 1, "rollout_max_sequences": 2,
    "rollout_memory_share": 0.5, "rollout_kv_cache_bytes": "1MiB", "rollout_enforce_eager": True,
    "rollout_prefix_caching": True, "rollout_sleep": True, "rollout_time_limit": 1, "rollout_probe_interval": 1,
    "weight_sync_bucket_size": "1MiB", "save": "x", "max_skipped_steps": 3, "conversations": "x",
    "validation_conversations": "x", "overlong_conversations": "skip", "prompts": "x", "responses": "x",
    "truncated_responses": "keep", "branches": "x.json", "log_samples": 2, "log_samples_interval": 3,
}  # fmt: skip
COMMON = {
    "stage",
    "dry_run",
    "chat_template_kwargs",
    "output_head",
    "max_tokens_per_microbatch",
}  # of CaMOPD's own, what every stage reads


def line_of(**values: Any) -> list[str]:
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


STAGE_NAMES = ("distill", "sft", "generate")


def flags_read(stage: str) -> set[str]:
    """Argument names that this stage reads, but for those that every stage reads."""
    accelerator.activate()  # before Megatron is imported
    from megatron_camopd.stages.registry import STAGES

    assert tuple(STAGES) == STAGE_NAMES
    own = {name for cls in STAGES[stage].settings for name in cls.argument_names()}
    return (own | {"save"}) - set(STAGES[stage].unused_megatron_flags)


def test_every_flag_is_tried() -> None:
    assert VALUES.keys() == set().union(*map(flags_read, STAGE_NAMES))
    from megatron_camopd.stages.arguments import GROUPS

    everything = {name for cls in GROUPS for name in cls.argument_names()}
    assert everything | {"save"} == VALUES.keys() | COMMON and not VALUES.keys() & COMMON


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_flags_of_other_stages_are_refused(stage: str) -> None:
    others = VALUES.keys() - flags_read(stage)
    assert others
    for name in others:
        line = refusal(["--stage", stage, *line_of(**{name: VALUES[name]})])
        assert line == f"--{name.replace('_', '-')}: has no effect with --stage {stage}; drop one of the two"


def sft(world: World, run: Path, **changes: Any) -> list[str]:
    conversations = run.with_name("c.jsonl")
    conversations.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    settings = {"load": world.student, "save": run, "conversations": conversations, "seq_length": 64,
                "global_batch_size": 4, "train_iters": 2}  # fmt: skip
    return ["--stage", "sft", *line_of(**{name: value for name, value in (settings | changes).items() if value})]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"load": None}, "--load: missing; it has no default"),
        ({"save": None}, "--save: missing; it has no default"),
        ({"conversations": None}, "--conversations: missing; it has no default"),
        ({"seq_length": None}, "--seq-length: missing; it has no default"),
        ({"seq_length": 129}, "--seq-length 129: the model has 128 positions; lower it"),
        ({"micro_batch_size": 3}, "--global-batch-size 4: must be a multiple of 3"),
        ({"eval_interval": -1}, "--eval-interval -1: must be at least 1"),
    ],
)
def test_what_sft_needs(world: World, tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    assert refusal(sft(world, tmp_path / "run", **changes)).startswith(line)
    assert not (tmp_path / "run").exists()


def test_validation_that_does_not_fit_is_found_before_the_run(world: World, tmp_path: Path) -> None:
    held_out = tmp_path / "v.jsonl"
    held_out.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "' + "long " * 99 + '"}]}\n'
    )
    line = refusal(sft(world, tmp_path / "run", validation_conversations=held_out, overlong_conversations="skip"))
    assert line.startswith("--validation-conversations: not one of the 1 conversations fits --seq-length")


def test_sft_is_accepted(world: World, tmp_path: Path) -> None:
    args, plan = prepare(sft(world, tmp_path / "run"))
    assert args.stage == "sft" and not args.masked_softmax_fusion and len(plan.stream) == 1  # type: ignore[attr-defined]
    assert LayoutSizes.of(args).data == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"prompts": None}, "--prompts: missing; it has no default"),
        ({"responses": None}, "--responses: missing; it has no default"),
        ({"responses": "/"}, "--responses /: is a folder; name a file"),
        ({"responses": "/proc/none/x.jsonl"}, "--responses /proc/none: /proc is not a writable folder"),
        ({"load": "/nowhere"}, "--load /nowhere: no such folder"),
    ],
)
def test_what_generate_needs(world: World, tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    settings = {"load": world.student, "prompts": world.general, "responses": tmp_path / "r.jsonl",
                "max_prompt_length": 40, "max_response_length": 24, "global_batch_size": 4}  # fmt: skip
    values = {name: value for name, value in (settings | changes).items() if value}
    assert refusal(["--stage", "generate", *line_of(**values)]).startswith(line)
