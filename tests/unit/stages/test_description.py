"""``--dry-run``: the plan in words, against numbers counted by hand and against the model that Megatron builds."""

from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.stages.description import largest_shard, parameters
from tests.support.saved_runs import save_run
from tests.support.worlds import World, prepare, refusal


def description(world: World, **changes: Any) -> str:
    args, plan = prepare(world.flags(**changes))
    from megatron_camopd.stages.registry import describe_stage

    return describe_stage(args, plan)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tmp_path: Path, tied: bool) -> None:
    from transformers import Qwen3ForCausalLM

    from tests.support.worlds import make_checkpoint

    student = make_checkpoint(tmp_path / "student", tie_word_embeddings=tied)
    world = World(tmp_path)
    for name in ("general", "domain"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    args, _ = prepare(world.flags(load=student, general_teacher_load=student, make_vocab_size_divisible_by=None))
    sizes = parameters(args)
    total = sizes["layers"] + (1 if tied else 2) * sizes["embedding"] + sizes["norm"]
    model = Qwen3ForCausalLM.from_pretrained(student.with_name("student-hf"))
    padding = (1 if tied else 2) * (args.padded_vocab_size - args.vocab_size) * args.hidden_size
    assert total - padding == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("flags", "layers", "embeddings", "norms"),
    [
        ({"decoder_last_pipeline_num_layers": 1}, 2, 1, 0),  # the first stage: as many layers as the middle one
        ({"decoder_last_pipeline_num_layers": 3}, 3, 1, 1),
        ({"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2}, 2, 1, 1),
    ],
)
def test_memory_of_an_uneven_pipeline_is_that_of_its_largest_stage(
    tmp_path: Path, flags: dict[str, int], layers: int, embeddings: int, norms: int
) -> None:
    from tests.support.worlds import make_checkpoint, write_prompts

    world = World(tmp_path)
    make_checkpoint(world.student, num_hidden_layers=5, tie_word_embeddings=False)
    for path in (world.general, world.domain):
        write_prompts(path, path.stem)
    args, plan = prepare(
        world.flags(general_teacher_load=world.student, dry_run=3, pipeline_model_parallel_size=3, **flags)
    )
    sizes = parameters(args)
    expected = layers * sizes["layers"] // 5 + embeddings * sizes["embedding"] + norms * sizes["norm"]
    assert largest_shard(args) == expected
    from megatron_camopd.stages.registry import describe_stage

    divided = {1: "2 + 2 + 1", 3: "1 + 1 + 3", 2: "1 + 2 + 2"}[flags["decoder_last_pipeline_num_layers"]]
    assert f"tensor 1 x pipeline 3 x data 1, layers of the stages {divided}" in describe_stage(args, plan)


def test_distillation(world: World, tmp_path: Path) -> None:
    text = description(world, save=tmp_path / "run", dry_run=8, train_iters=6, global_batch_size=16,
                       tensor_model_parallel_size=2, micro_batch_size=2)  # fmt: skip
    assert "processes: 8 = tensor 2 x pipeline 1 x data 4" in text
    assert "5 general, 1 domain steps" in text
    assert "16 prompts a step, 4 on a data-parallel rank; at most 2 microbatches of 128 tokens" in text
    assert "at most 1,024 a step" in text  # 16 x (40 + 24)
    assert "general prompts: 20 rows, longest 27 tokens; 80 drawn, 4.00 epochs" in text
    assert "domain prompts: 20 rows, longest 26 tokens; 16 drawn, 0.80 epochs" in text
    assert "2 teachers in host memory" in text and text.endswith("nothing was started or written")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_says_so(world: World, tmp_path: Path) -> None:
    run = save_run(world, tmp_path / "run")
    assert f"steps: 2, resumed from the checkpoint in {run}" in description(world, save=run, dry_run=1)


def test_mistakes_are_found(world: World, tmp_path: Path) -> None:
    line = refusal(world.flags(save=tmp_path / "run", dry_run=6, global_batch_size=16))
    assert line.startswith("--global-batch-size 16: must be a multiple of 6")
