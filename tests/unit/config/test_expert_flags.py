"""Flags of a run whose model has experts: what the checkpoint states, what is refused, and the dry run's numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.families import qwen3_moe, registry
from megatron_camopd.stages.description import _shard, largest_shard, parameters
from megatron_camopd.stages.registry import describe_stage
from tests.support.worlds import EXPERTS, World, make_checkpoint, prepare, refusal, write_prompts

LAYERS: dict[str, Any] = {"num_hidden_layers": 4, "decoder_sparse_step": 2}  # experts in layers 1 and 3
EXPERT, DENSE, ROUTER = 3 * 24 * 32, 3 * 48 * 32, 8 * 32
ATTENTION = 32 * 8 * (4 + 2 + 2) + 4 * 8 * 32 + 2 * 8 + 2 * 32


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The inputs of a run whose student and teacher have experts in every other layer."""
    made = World(tmp_path_factory.mktemp("experts"))
    for seed, path in enumerate((made.student, made.teacher)):
        make_checkpoint(path, seed=seed, tie_word_embeddings=True, **EXPERTS, **LAYERS)
    write_prompts(made.general, "general")
    write_prompts(made.domain, "domain")
    return made


def test_a_run_takes_the_experts_from_the_checkpoint(experts: World, tmp_path: Path) -> None:
    same = {
        "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": "([0]+[1])*2", "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
    }  # fmt: skip
    args, _ = prepare(experts.flags(save=tmp_path / "run", **same))
    assert (args.num_experts, args.moe_layer_freq, args.moe_ffn_hidden_size) == (8, [0, 1, 0, 1], 24)
    assert (args.moe_router_topk, args.moe_router_pre_softmax, args.moe_router_dtype) == (2, False, "fp32")
    assert (args.moe_token_dispatcher_type, args.moe_router_load_balancing_type) == ("alltoall", "none")
    assert (args.moe_aux_loss_coeff, args.moe_z_loss_coeff, args.moe_shared_expert_intermediate_size) == (
        0.0,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        (["--moe-router-topk", "4"], "has 2"),
        (["--moe-ffn-hidden-size", "48"], "has 24"),
        (["--moe-layer-freq", "2"], r"has [0, 1, 0, 1]"),
        (["--moe-router-score-function", "sigmoid"], "has softmax"),
        (["--moe-router-pre-softmax"], "is made without it"),
        (["--moe-router-dtype", "fp64"], "has fp32"),
        (["--moe-token-dispatcher-type", "allgather"], "has alltoall"),
        (["--moe-shared-expert-intermediate-size", "24"], "is a Qwen3 with experts"),
        (["--moe-router-topk-scaling-factor", "2.5"], "has None"),
        (["--moe-expert-capacity-factor", "1.0"], "has None"),
        (["--moe-z-loss-coeff", "0.1"], "has None"),
        (["--moe-input-jitter-eps", "0.1"], "has None"),
        (["--moe-router-enable-expert-bias"], "is made without it"),
        (["--moe-router-force-load-balancing"], "is made without it"),
        (["--moe-shared-expert-overlap"], "is a Qwen3 with experts"),
        (["--moe-use-upcycling"], "is a Qwen3 with experts"),
        (["--mup-embedding-mult", "2.0"], "is a Qwen3 with experts"),
    ],
)
def test_another_model_is_refused(flags: list[str], has: str, experts: World, tmp_path: Path) -> None:
    line = refusal([*experts.flags(save=tmp_path / "run"), *flags])
    assert line.startswith(flags[0]) and f": the model in --load {experts.student} {has}; drop the flag" in line


def test_what_training_does_not_support_is_refused(experts: World, tmp_path: Path) -> None:
    line = refusal([*experts.flags(save=tmp_path / "run"), "--num-experts", "8"])
    assert line.startswith("--num-experts 8: not supported by CaMOPD training")


def sft(world: World, tmp_path: Path, **changes: Any) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return world.flags(
        stage="sft", save=tmp_path / "run", general_teacher_load=None, general_prompts=None, domain_prompts=None,
        max_prompt_length=None, max_response_length=None, seq_length=64, conversations=rows, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_model_parallel_size": 0}, "--expert-model-parallel-size 0: must be at least 1"),
        ({"expert_model_parallel_size": 3, "dry_run": 3, "global_batch_size": 3},
         "--expert-model-parallel-size 3: must divide the 8 experts"),
        ({"expert_model_parallel_size": 2, "dry_run": 3, "global_batch_size": 3},
         "--expert-model-parallel-size 2 x --expert-tensor-parallel-size 1 x --pipeline-model-parallel-size 1 = 2 does "
         "not divide the 3 processes"),
        ({"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "dry_run": 2},
         "--expert-model-parallel-size 2 x --expert-tensor-parallel-size 2 x --pipeline-model-parallel-size 1 = 4"),
        ({"expert_tensor_parallel_size": 2, "dry_run": 2}, "--expert-tensor-parallel-size: experts are cut like"),
        ({"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 0, "dry_run": 2},
         "--expert-tensor-parallel-size 0: must be at least 1"),
        ({"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 5, "dry_run": 10, "global_batch_size": 10},
         "--expert-tensor-parallel-size 5: must divide the experts' width of 24"),
        ({"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "dry_run": 4,
          "decoder_first_pipeline_num_layers": 1},
         "--pipeline-model-parallel-size 2: stage 0 would have dense layers alone"),
    ],
)  # fmt: skip
def test_processes_that_cannot_share_the_experts(
    changes: dict[str, Any], words: str, experts: World, tmp_path: Path
) -> None:
    assert refusal(sft(experts, tmp_path, **changes)).startswith(words)


def test_experts_are_whole_where_they_are_spread(experts: World, tmp_path: Path) -> None:
    spread = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2, "dry_run": 4}
    assert prepare(sft(experts, tmp_path, **spread))[0].expert_tensor_parallel_size == 1
    given = prepare(sft(experts, tmp_path, expert_tensor_parallel_size=2, **spread))[0]
    assert given.expert_tensor_parallel_size == 2


def test_a_dense_model_cannot_be_spread(world: World, tmp_path: Path) -> None:
    line = refusal(sft(world, tmp_path, expert_model_parallel_size=2, dry_run=2))
    assert line == "--expert-model-parallel-size 2: the model has no experts; drop it"


@pytest.mark.parametrize("stage", ["distill", "generate"])
def test_stages_that_sample_refuse_expert_parallelism(stage: str, experts: World, tmp_path: Path) -> None:
    line = experts.flags(save=tmp_path / "run", expert_model_parallel_size=2, dry_run=2)
    if stage == "generate":
        line = experts.flags(
            stage=stage, save=None, general_teacher_load=None, general_prompts=None, domain_prompts=None,
            train_iters=None, prompts=experts.general, responses=tmp_path / "out.jsonl", expert_model_parallel_size=2,
            dry_run=2,
        )  # fmt: skip
    assert refusal(line) == (
        f"--expert-model-parallel-size 2: --stage {stage} samples responses, which no rollout engine can do with it "
        "yet; it works with --stage sft"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_model_parallel_size": 2, "dry_run": 2},
         "--tensor-model-parallel-size 2: Megatron takes models with experts only with sequence parallelism"),
        pytest.param(
            {"rollout_engine": "vllm"}, "--rollout-engine vllm: the weights of experts cannot be sent to it yet; use",
            marks=pytest.mark.vllm,
        ),
    ],
)  # fmt: skip
def test_what_does_not_work_with_experts(changes: dict[str, Any], words: str, experts: World, tmp_path: Path) -> None:
    assert refusal(experts.flags(save=tmp_path / "run", **changes)).startswith(words)


def test_a_dense_model_takes_no_flag_about_experts(world: World, tmp_path: Path) -> None:
    line = refusal([*world.flags(save=tmp_path / "run"), "--moe-router-topk", "2"])
    assert line.endswith(f"the model in --load {world.student} is a dense Qwen3; drop the flag")


def test_grouped_kernels_belong_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on GPUs may have saved the checkpoint with them; Megatron refuses them on a CPU."""
    family = qwen3_moe.FAMILY

    def saved_with_them(arch: Any) -> dict[str, Any]:
        return family.megatron_arguments(arch) | {"moe_grouped_gemm": True}

    world = World(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(
            registry.FAMILIES, family.model_type, dataclasses.replace(family, megatron_arguments=saved_with_them)
        )
        make_checkpoint(world.student, **EXPERTS)
    for path in (world.general, world.domain):
        write_prompts(path, path.stem)
    args, _ = prepare(world.flags(general_teacher_load=world.student))
    assert args.moe_grouped_gemm is False


def test_the_dry_run_counts_all_and_active_parameters(experts: World, tmp_path: Path) -> None:
    args, plan = prepare(experts.flags(save=tmp_path / "run"))
    ends = args.padded_vocab_size * 32 + 32
    common = 4 * ATTENTION + 2 * DENSE + 2 * ROUTER
    assert sum(parameters(args).values()) == ends + common + 2 * 8 * EXPERT
    assert sum(parameters(args, active=True).values()) == ends + common + 2 * 2 * EXPERT
    assert largest_shard(args) == ends + common + 2 * 8 * EXPERT
    assert "B parameters (0.00 B active, 2 of 8 experts), 4 layers, hidden 32" in describe_stage(args, plan)


def test_the_dry_run_counts_the_experts_of_a_process(experts: World, tmp_path: Path) -> None:
    args, _ = prepare(sft(experts, tmp_path, expert_model_parallel_size=4, dry_run=4))
    ends, common = args.padded_vocab_size * 32 + 32, 4 * ATTENTION + 2 * DENSE + 2 * ROUTER
    assert largest_shard(args) == ends + common + 2 * 2 * EXPERT
    sharded = prepare(sft(experts, tmp_path, expert_model_parallel_size=4, dry_run=8, use_distributed_optimizer=True,
                          global_batch_size=8))[0]  # fmt: skip
    assert _shard(sharded) == (ends + common, 2 * 2 * EXPERT)
    spread = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2, "dry_run": 4}
    args, _ = prepare(sft(experts, tmp_path, **spread))
    ends = args.padded_vocab_size * 32 + 32
    assert largest_shard(args) == (ends + common) // 2 + 2 * 4 * EXPERT


def test_the_dry_run_of_a_pipeline_counts_the_layers_of_each_stage(experts: World, tmp_path: Path) -> None:
    flags = {"dry_run": 2, "pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 3}
    args, _ = prepare(experts.flags(save=tmp_path / "run", **flags))
    embedding = args.padded_vocab_size * 32
    first = embedding + 3 * ATTENTION + 2 * DENSE + ROUTER + 8 * EXPERT
    last = embedding + 32 + ATTENTION + ROUTER + 8 * EXPERT
    assert largest_shard(args) == max(first, last) == first
