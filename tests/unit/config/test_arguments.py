"""The command line: defaults are the paper's, Megatron's flags keep their meaning, and every mistake is one line.

A refused command line has written nothing: no ``--save`` folder exists afterwards.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_camopd.checkpoint.directory import TRACKER
from tests.support.worlds import World, make_checkpoint, prepare, refusal

LOAD_FLAGS = ("load", "general_teacher_load", "domain_teacher_load")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refused(world: World, save: Path, *extra: Any, **changes: Any) -> str:
    """The line with which the world's command line with these changes is refused; nothing was written."""
    line = refusal([*world.flags(save=save, **changes), *map(str, extra)])
    assert not save.exists()
    return line


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with room for the paper's prompt and response lengths."""
    return make_checkpoint(tmp_path_factory.mktemp("long") / "student", max_position_embeddings=40960)


def test_defaults_are_the_papers(world: World, long_model: Path, tmp_path: Path) -> None:
    free = dict.fromkeys(("max_prompt_length", "max_response_length", "global_batch_size", "train_iters"))
    teacher = {"general_teacher_load": long_model}
    args, _ = prepare(world.flags(save=tmp_path / "run", load=long_model, **teacher, **free))
    expected = {
        "distill_method": "camopd",
        "recovery_steps": 3,
        "preservation_steps": 1,
        "general_mass_target": 0.8,
        "domain_mass_target": 0.8,
        "general_feedback_scale": 2.0,
        "domain_feedback_scale": 1.0,
        "importance_correction": "mask",
        "importance_low": 0.5,
        "importance_high": 5.0,
        "global_batch_size": 512,
        "train_iters": 120,
        "lr": 2e-6,
        "lr_decay_style": "constant",
        "max_prompt_length": 4096,
        "max_response_length": 32768,
        "rollout_temperature": 1.0,
        "seq_length": 4096 + 32768,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "save_interval": 20,
        "output_head": "fused",
        "resume": False,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert not (tmp_path / "run").exists()


def test_megatron_flags_keep_their_meaning(world: World, tmp_path: Path) -> None:
    """An explicit value wins over this project's default, sizes come from the checkpoint."""
    given: dict[str, Any] = {
        "lr": 1e-4, "lr_decay_style": "cosine", "min_lr": 1e-5, "weight_decay": 0.3, "clip_grad": 0.5, "seed": 7,
        "adam_beta2": 0.95, "micro_batch_size": 2, "save_interval": 5, "exit_interval": 3, "seq_length": 100,
        "attention_dropout": 0.1, "train_iters": 9,
    }  # fmt: skip
    args, _ = prepare(world.flags(save=tmp_path / "run", bf16=True, **given))
    assert {name: getattr(args, name) for name in given} == given
    assert args.bf16 and args.params_dtype is torch.bfloat16
    sizes = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 8, "max_position_embeddings": 128, "vocab_size": 259, "padded_vocab_size": 384,
        "qk_layernorm": True, "swiglu": True, "normalization": "RMSNorm", "rotary_base": 10000,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in sizes} == sizes


def test_a_size_flag_may_repeat_the_checkpoint(world: World, tmp_path: Path) -> None:
    assert prepare(world.flags(save=tmp_path / "run", num_layers=2, hidden_size=32))[0].num_layers == 2
    line = refused(world, tmp_path / "run", num_layers=7)
    assert line == f"--num-layers 7: the model in --load {world.student} has 2; drop the flag"
    assert "--vocab-size 64" in refused(world, tmp_path / "run", vocab_size=64)


def test_layout_of_several_processes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    args, _ = prepare(world.flags(save=tmp_path / "run", **layout))
    assert args.data_parallel_size == 2
    assert args.padded_vocab_size == 512  # a multiple of 128 a rank


@pytest.mark.parametrize("name", LOAD_FLAGS)
def test_checkpoint_folders(name: str, world: World, tmp_path: Path) -> None:
    save, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    where = {name: tmp_path / "nowhere"}
    assert refused(world, save, **where) == (
        f"{flag_of(name)} {tmp_path / 'nowhere'}: no such folder; expected a Megatron checkpoint directory"
    )
    line = refused(world, save, **{name: empty})
    assert line.startswith(f"{flag_of(name)} {empty}: holds no complete Megatron checkpoint; expected {TRACKER}")
    line = refused(world, save, **{name: world.root / "student-hf"})
    assert line.startswith(f"{flag_of(name)} {world.root / 'student-hf'}: ")
    assert "Hugging Face folder; convert it with checkpoints_convert/hf_to_megatron.py" in line
    assert not list(empty.iterdir())


@pytest.mark.parametrize("damaged", [".metadata", "metadata.json", "*.distcp"])
def test_damaged_checkpoint(damaged: str, world: World, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(world.student, tmp_path / "broken"))
    paths = list((broken / "release").glob(damaged))
    assert paths
    for path in paths:
        path.write_bytes(path.read_bytes()[:20])
    line = refused(world, tmp_path / "run", load=broken)
    assert line.startswith(f"--load {broken}: its checkpoint cannot be read (") and line.endswith("it is damaged")


@pytest.mark.parametrize("missing", [".metadata", "metadata.json"])
def test_unfinished_checkpoint(missing: str, world: World, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(world.student, tmp_path / "broken"))
    (broken / "release" / missing).unlink()
    line = refused(world, tmp_path / "run", load=broken)
    assert line.startswith(f"--load {broken}: holds no complete Megatron checkpoint; expected {TRACKER}")


@pytest.mark.parametrize("name", ["load", "save", "general_teacher_load", "general_prompts", "domain_prompts"])
def test_required_flags(name: str, world: World, tmp_path: Path) -> None:
    assert refusal(world.flags(**({"save": tmp_path / "run"} | {name: None}))) == (
        f"{flag_of(name)}: missing; it has no default"
    )
    assert not list(tmp_path.iterdir())


def test_only_scheduled_branches_need_inputs(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    domain_only = {"recovery_steps": 0, "general_teacher_load": None, "general_prompts": None}
    args, plan = prepare(world.flags(save=save, **domain_only))
    assert plan.names == ["general", "domain"] and list(plan.streams) == list(plan.teacher_of) == [1]
    assert [teacher.location.directory for teacher in plan.teachers] == [world.student]
    _, plan = prepare(world.flags(save=save, preservation_steps=0, domain_prompts=None))
    assert list(plan.streams) == list(plan.teacher_of) == [0] and len(plan.teachers) == 1
    line = refused(world, save, recovery_steps=0, preservation_steps=0)
    assert line == "--recovery-steps 0 and --preservation-steps 0: at least one must be positive"


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        *[(f"{branch}_mass_target", value, r"must be in (0, 1]")
          for branch in ("general", "domain") for value in ("0.0", "-0.1", "1.01", "nan", "inf")],
        *[(f"{branch}_feedback_scale", value, "must be a positive number")
          for branch in ("general", "domain") for value in ("0.0", "-1.0", "nan", "inf")],
        *[("rollout_temperature", value, "must be above 0") for value in ("0.0", "-1.0", "nan")],
        *[("lr", value, "must be a number, 0 or more") for value in ("nan", "-1.0", "inf")],
        ("recovery_steps", "-1", "must be at least 0"),
        ("preservation_steps", "-1", "must be at least 0"),
        *[(name, "0", "must be at least 1")
          for name in ("max_skipped_steps", "rollout_batch_size", "max_prompt_length", "max_response_length", "seed",
                       "micro_batch_size", "global_batch_size", "train_iters", "tensor_model_parallel_size",
                       "pipeline_model_parallel_size", "decoder_first_pipeline_num_layers",
                       "decoder_last_pipeline_num_layers")],
        ("decoder_last_pipeline_num_layers", "-1", "must be at least 1"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(name: str, value: str, right: str, world: World, tmp_path: Path) -> None:
    assert refused(world, tmp_path / "run", **{name: value}) == f"{flag_of(name)} {value}: {right}"


@pytest.mark.parametrize(("low", "high"), [("3.0", "2.0"), ("-1.0", "5.0"), ("nan", "5.0"), ("0.5", "nan")])
def test_importance_bounds(low: str, high: str, world: World, tmp_path: Path) -> None:
    line = refused(world, tmp_path / "run", importance_low=low, importance_high=high)
    assert line == f"--importance-low {low} and --importance-high {high}: need 0 <= low <= high"


def test_lengths(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert refused(world, save, seq_length=63) == (
        "--seq-length 63: too short for --max-prompt-length 40 + --max-response-length 24 = 64"
    )
    for changes, length in (({"seq_length": 129}, 129), ({"max_response_length": 100}, 140)):
        line = refused(world, save, **changes)
        assert line.startswith(f"--seq-length {length}: the model has 128 positions; lower it")
    assert prepare(world.flags(save=save, seq_length=128))[0].seq_length == 128


def test_batch_is_shared_out_evenly(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(world, tmp_path / "run", global_batch_size=5) == (
        "--global-batch-size 5: must be a multiple of 2 (data-parallel size 2 x --micro-batch-size 1)"
    )
    line = refused(world, tmp_path / "run", global_batch_size=6, micro_batch_size=2)
    assert line == "--global-batch-size 6: must be a multiple of 4 (data-parallel size 2 x --micro-batch-size 2)"


@pytest.mark.parametrize(
    ("processes", "tensor", "pipeline", "words"),
    [
        (
            1,
            2,
            1,
            "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 1 = 2 does not divide the 1 process",
        ),
        (3, 2, 1, "= 2 does not divide the 3 processes; start a multiple of 2 (torchrun --nproc-per-node)"),
        (
            6,
            2,
            2,
            "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2 = 4 does not divide the 6 process",
        ),
        (4, 4, 1, "--tensor-model-parallel-size 4: must divide the 2 query groups"),
        (3, 3, 1, "--tensor-model-parallel-size 3: must divide the 4 attention heads"),
        (3, 1, 3, "--pipeline-model-parallel-size 3: must divide the 2 layers"),
    ],
)
def test_parallel_sizes(
    processes: int, tensor: int, pipeline: int, words: str,
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    assert words in refused(world, tmp_path / "run", global_batch_size=12, **sizes)


def test_save_must_be_writable(world: World, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "gone" / "away")
    for save, found in ((file / "run", file), (file, file), (dangling, dangling)):
        line = refusal(world.flags(save=save))
        assert line.startswith(f"--save {save}: {found} is not a writable folder ("), line
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"} and file.read_bytes() == b""
    read_only = tmp_path / "read-only"
    read_only.mkdir(mode=0o555)
    if os.geteuid() != 0:  # root may write there
        assert f"{read_only} is not a writable folder" in refusal(world.flags(save=read_only / "run"))
    if Path("/proc/self").exists():  # which nobody may
        assert "/proc is not a writable folder" in refusal(world.flags(save="/proc/run"))
    line = refused(world, tmp_path / "run", tensorboard_dir=file / "board")
    assert line.startswith(f"--tensorboard-dir {file / 'board'}: {file} is not a writable folder")


def test_save_holding_a_converted_model(world: World, tmp_path: Path) -> None:
    before = sorted(world.student.rglob("*"))
    for save in (world.student, Path(shutil.copytree(world.teacher, tmp_path / "copy"))):
        line = refusal(world.flags(save=save))
        assert line == f"--save {save}: holds a converted model; give training a folder of its own"
    assert sorted(world.student.rglob("*")) == before


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--frobnicate", "3"], "unrecognized arguments: --frobnicate 3"),
        (["--general-mass-target", "much"], "argument --general-mass-target: invalid float value: 'much'"),
        (["--distill-method", "magic"], "argument --distill-method: invalid choice: 'magic'"),
        (["--output-head", "slow"], "argument --output-head: invalid choice: 'slow'"),
        (["--general-prompts"], "argument --general-prompts: expected at least one argument"),
        (["--chat-template-kwargs", "{x"], "argument --chat-template-kwargs: '{x' is not JSON (Expecting property"),
        (["--chat-template-kwargs", "[1]"], "argument --chat-template-kwargs: '[1]' is not a JSON object"),
        (["--chat-template-kwargs", '{"tokenize": false}'], "--chat-template-kwargs tokenize: is set by this program"),
        (["--batch-size", "3"], "Megatron refuses the flags: --batch-size argument is no longer valid, use --micro-"),
        (["--overlap-param-gather"], "Megatron refuses the flags: --overlap-param-gather only supported with"),
    ],
)
def test_command_line(extra: list[str], words: str, world: World, tmp_path: Path) -> None:
    assert refused(world, tmp_path / "run", *extra).startswith(words)


@pytest.mark.parametrize(
    "extra",
    [
        ["--fp32-residual-connection"],
        ["--num-experts", "4"],
        ["--num-layers-per-virtual-pipeline-stage", "1"],
        ["--num-virtual-stages-per-pipeline-rank", "2"],
        ["--pipeline-model-parallel-layout", "Et|tL"],
        ["--fp8-format", "hybrid"],
        ["--fp4-format", "e2m1"],
        ["--delay-wgrad-compute"],
        ["--mtp-num-layers", "1"],
        ["--ckpt-format", "torch"],
        ["--train-samples", "10"],
        ["--async-save"],
        ["--enable-cuda-graph"],
        ["--checkpoint-activations"],  # Megatron would end the process with status 0
        ["--yaml-cfg", "settings.yaml"],
    ],
)
def test_megatron_features_that_are_not_driven(extra: list[str], world: World, tmp_path: Path) -> None:
    line = refused(world, tmp_path / "run", *extra)
    assert line.startswith(f"{extra[0]}") and "not supported by CaMOPD training" in line
    assert extra[0] == "--yaml-cfg" or line.startswith(" ".join(extra) + ": ")


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--num-layers-per-virtual-pipeline-stage", "1", "it hides little of a step in which rollouts dominate, and "),
        ("--num-virtual-stages-per-pipeline-rank", "2", "it hides little of a step in which rollouts dominate, and "),
        ("--pipeline-model-parallel-layout", "Et|tL", "a layout can give a stage several chunks, and "),
    ],
)
def test_pipelines_with_several_chunks_a_stage(flag: str, value: str, why: str, world: World, tmp_path: Path) -> None:
    assert refused(world, tmp_path / "run", flag, value) == (
        f"{flag} {value}: not supported by CaMOPD training; {why}scoring, decoding and weight sync know one chunk a "
        "stage; use --pipeline-model-parallel-size, uneven with --decoder-first-pipeline-num-layers or "
        "--decoder-last-pipeline-num-layers"
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--ckpt-step", "3"], "a new run starts from the newest checkpoint in --load"),
        (["--data-path", "corpus"], "prompts come from --general-prompts and --domain-prompts"),
        (["--train-data-path", "corpus"], "prompts come from --general-prompts and --domain-prompts"),
        (["--mock-data"], "prompts come from --general-prompts and --domain-prompts"),
        (["--tokenizer-model", "elsewhere"], "the tokenizer and its chat template come with the checkpoint in --load"),
    ],
)
def test_megatron_flags_that_something_else_replaces(
    extra: list[str], words: str, world: World, tmp_path: Path
) -> None:
    line = refused(world, tmp_path / "run", *extra)
    assert line.startswith(f"{' '.join(extra)}: not supported by CaMOPD training; {words}")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--defer-embedding-wgrad-compute"], "the output head finishes its weight's gradient in the forward pass"),
        (["--wgrad-deferral-limit", "2"], "the output head finishes its weight's gradient in the forward pass"),
        (["--cross-entropy-loss-fusion"], "the output head computes the distillation loss itself"),
        (["--cross-entropy-fusion-impl", "te"], "the output head computes the distillation loss itself"),
        (["--fp16-lm-cross-entropy"], "the output head computes the distillation loss itself"),
        (["--fp8-output-proj"], "the output head multiplies in the model's precision"),
        (["--reuse-grad-buf-for-mxfp8-param-ag"], "the output head adds to the gradient buffer before the backward"),
        (["--tensor-parallel-num-weight-shards", "2"], "the output head's vocabulary is sharded by --tensor-model-"),
        (["--no-pad-vocab-size"], "the vocabulary is padded to equal shards"),
        (["--batch-invariant-mode"], "the output head's matrix products depend on how many tokens there are"),
        (["--logits-save-dir", "logits"], "the output head keeps no logits"),
        (["--logits-load-kd-loss-alpha", "0.5"], "the output head keeps no logits"),
    ],
)
def test_megatron_flags_that_the_output_head_contradicts(
    extra: list[str], words: str, world: World, tmp_path: Path
) -> None:
    line = refused(world, tmp_path / "run", *extra)
    assert line.startswith(f"{' '.join(extra)}: not supported by CaMOPD training; {words}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_lr": 1e-3}, "--min-lr 0.001: must be from 0 to --lr 2e-06"),
        ({"lr_warmup_init": 1e-3}, "--lr-warmup-init 0.001: must be from 0 to --lr 2e-06"),
        ({"lr_warmup_iters": 2, "lr_decay_style": "linear"},
         "--lr-warmup-iters 2: must be from 0 to below --train-iters 2"),
        ({"lr_warmup_iters": 4, "lr_decay_iters": 3}, "--lr-warmup-iters 4: must be from 0 to below --lr-decay-iters"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1.0: must be at least 0 and below 1"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters: missing; --lr-decay-style WSD needs it"),
        ({"weight_decay": "-0.1"}, "--weight-decay -0.1: must be at least 0"),
        ({"weight_decay_incr_style": "linear", "start_weight_decay": 0.1},
         "--start-weight-decay 0.1 and --end-weight-decay None: --weight-decay-incr-style linear needs 0 <= start"),
        ({"save_interval": 0}, "--save-interval 0: must be at least 1"),
    ],
)  # fmt: skip
def test_schedules(changes: dict[str, Any], words: str, world: World, tmp_path: Path) -> None:
    assert refused(world, tmp_path / "run", **changes).startswith(words)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_constant_rate_may_warm_up_to_the_end_of_the_run(steps: int, world: World, tmp_path: Path) -> None:
    line = {"train_iters": steps, "lr_warmup_iters": steps}
    assert prepare(world.flags(save=tmp_path / "run", **line))[0].lr_warmup_iters == steps
    line["lr_warmup_iters"] += 1
    expected = f"--lr-warmup-iters {steps + 1}: must be from 0 to --train-iters {steps}"
    assert refused(world, tmp_path / "run", **line) == expected


def test_a_schedule_may_be_longer_than_the_run(world: World, tmp_path: Path) -> None:
    line = {"train_iters": 2, "lr_warmup_iters": 4, "lr_decay_iters": 5}
    assert prepare(world.flags(save=tmp_path / "run", **line))[0].lr_warmup_iters == 4


def test_help(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "--save-interval 20" in text and "the last step is always saved" in text and "--general-prompts" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the flags are right on a machine with CUDA")
@pytest.mark.parametrize(
    ("extra", "needed"),
    [
        (["--transformer-impl", "transformer_engine"], "local"),
        (["--distributed-backend", "nccl"], "gloo"),
        (["--attention-backend", "flash"], "unfused"),
        (["--tp-comm-overlap"], "False"),
        (["--fp16"], "False"),
    ],
)
def test_flags_that_need_cuda(extra: list[str], needed: str, world: World, tmp_path: Path) -> None:
    value = (extra[1:] or ["True"])[0]
    assert refused(world, tmp_path / "run", *extra) == (
        f"{extra[0]} is {value}, but a machine without CUDA needs {needed}; drop the flag"
    )
