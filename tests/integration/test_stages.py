"""The stages beside distillation as commands: supervised fine-tuning resumes bit for bit, generation goes on.

Then the way of off-policy distillation in small: responses of a teacher become the conversations that the student is
trained on, and the result is a checkpoint that distillation can start from.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.directory import TRACKER
from tests.support.processes import run_ranks
from tests.support.runs import assert_same_checkpoint, pretrain, records, without_costs
from tests.support.worlds import SPECIAL_TOKENS, World, make_world, refusal

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
NONE = dict.fromkeys(("general_teacher_load", "general_prompts", "domain_prompts"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("stages") / "world")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {row}"},
                {"role": "assistant", "content": "yes " * (1 + row % 4)},
            ]
        }
        for row in range(30)
    ]
    (world.root / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def sft_flags(world: World, save: Path, **changes: Any) -> list[str]:
    settings = {
        "stage": "sft", "save": save, "max_prompt_length": None, "max_response_length": None, "seq_length": 128,
        "conversations": world.root / "conversations.jsonl", "train_iters": 4, "lr": 1e-3, "save_interval": 2,
        "lr_warmup_iters": 1, "validation_conversations": world.root / "conversations.jsonl", "eval_interval": 3,
    }  # fmt: skip
    return world.flags(**(NONE | settings | changes))


def generate_flags(world: World, output: Path, **changes: Any) -> list[str]:
    settings = {
        "stage": "generate", "save": None, "train_iters": None, "load": world.teacher, "prompts": world.general,
        "responses": output, "global_batch_size": 6, "truncated_responses": "keep", "max_response_length": 12,
    }  # fmt: skip
    return world.flags(**(NONE | settings | changes))


# Supervised fine-tuning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, PP2),
        (2, {"bf16": True, "use_distributed_optimizer": True}),
        (2, TP2 | {"sequence_parallel": True, "bf16": True}),
    ],
    ids=["one", "pp2", "dp2-bf16-distributed", "tp2-sp-bf16"],
)
def test_sft_resumes_bit_for_bit(world: World, tmp_path: Path, ranks: int, layout: dict[str, Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for save, steps in ((whole, 4), (parts, 2), (parts, 4)):
        line = sft_flags(world, save, train_iters=steps, **layout)
        assert run_ranks(pretrain, ranks, line) == [0] * ranks
    assert (parts / TRACKER).read_text() == "4"
    assert_same_checkpoint(parts / "iter_0000004", whole / "iter_0000004")
    found, expected = records(parts), records(whole)
    found[1].pop("validation_loss")  # the run of two steps measured it after its last
    assert list(map(without_costs, found)) == list(map(without_costs, expected))
    assert [("validation_loss" in record) for record in expected] == [False, False, True, True]
    assert expected[-1]["loss"] < expected[0]["loss"] and expected[0]["epoch"] > 0


def test_another_stage_is_another_run(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_ranks(pretrain, 1, sft_flags(world, save, train_iters=1)) == [0]
    line = refusal(world.flags(save=save))
    assert line.startswith(f"--stage is distill, but the checkpoint in --save {save} was made with sft")
    # Its weights are a student like any other.
    flags = world.flags(save=tmp_path / "distilled", load=save, train_iters=1, global_batch_size=2)
    assert run_ranks(pretrain, 1, flags) == [0]


def test_a_bad_row_is_found_before_anything_starts(world: World, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "only a question"}]}\n')
    line = refusal(sft_flags(world, tmp_path / "run", conversations=bad))
    assert line == f"--conversations: {bad} line 1 has no assistant message, so nothing to learn from; remove the row"
    assert not (tmp_path / "run").exists()


# Generation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def responses(world: World) -> Path:
    output = world.root / "responses.jsonl"
    assert run_ranks(pretrain, 1, generate_flags(world, output)) == [0]
    return output


def test_every_prompt_has_a_response(world: World, responses: Path) -> None:
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    counts = json.loads(responses.with_name("responses.jsonl.json").read_text())["counts"]
    assert (
        len(rows) == counts["written"] == 20 - counts["empty"] - counts["refused"]
        and counts["prompts"] == 20
        and counts["rounds"] == 4
    )
    asked = [row["messages"][0]["content"] for row in rows]
    assert asked == [f"general {row}" for row in range(20) if f"general {row}" in asked]  # in the prompts' order
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
    texts = [row["messages"][1]["content"] for row in rows]
    assert counts["refused"] > 0 and not any(token in text for token in SPECIAL_TOKENS for text in texts)
    assert counts["bytes"] == responses.stat().st_size and counts["tokens"] > 100
    assert not list(responses.parent.glob("responses.jsonl.partial*"))


@pytest.mark.parametrize("layout", [{}, TP2, PP2], ids=["dp2", "tp2", "pp2"])
def test_the_same_responses_on_every_layout(
    world: World, responses: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    output = tmp_path / "responses.jsonl"
    assert run_ranks(pretrain, 2, generate_flags(world, output, **layout)) == [0, 0]
    assert output.read_bytes() == responses.read_bytes()


def stop_in_the_third_round(line: list[str]) -> int:
    from megatron_camopd.errors import RolloutError
    from megatron_camopd.rollout.megatron_engine import MegatronEngine

    generate = MegatronEngine.generate

    def failing(self: Any, *arguments: Any, step: int) -> Any:
        if step == 2:
            raise RolloutError("the third round fails")
        return generate(self, *arguments, step=step)

    MegatronEngine.generate = failing  # type: ignore[method-assign]
    return pretrain(line)


def stop_by_a_signal(line: list[str], name: str, rank: int) -> int:
    """Generate; while the second round is written, this process gets the signal; or its lock goes to another run."""
    import os
    import signal

    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron_camopd.stages.generate.runner import GenerateRunner

    write_round = GenerateRunner._round

    def stopped(self: GenerateRunner, number: int, *arguments: Any) -> None:
        if number == 1 and int(os.environ["RANK"]) == rank:
            if name:
                os.kill(os.getpid(), signal.Signals[name])
            else:
                Path(f"{line[line.index('--responses') + 1]}.lock").write_text('{"pid": 1, "host": "node-7"}')
        write_round(self, number, *arguments)

    setattr(GenerateRunner, "_round", stopped)  # noqa: B010 - assigning to a method
    return pretrain(line)


@pytest.mark.parametrize(("name", "rank", "rounds"), [("SIGTERM", 1, 2), ("SIGTERM", 0, 2), ("", 0, 1)])
def test_generation_stops_and_goes_on(
    name: str, rank: int, rounds: int, world: World, responses: Path, tmp_path: Path
) -> None:
    output = tmp_path / "responses.jsonl"
    assert run_ranks(stop_by_a_signal, 2, generate_flags(world, output), name, rank) == [75, 75]
    manifest = json.loads((tmp_path / "responses.jsonl.partial.json").read_text())
    assert not output.exists() and manifest["counts"]["rounds"] == rounds
    lock = tmp_path / "responses.jsonl.lock"
    assert lock.exists() == (not name)  # that of another run is left alone
    lock.unlink(missing_ok=True)
    assert run_ranks(pretrain, 2, generate_flags(world, output)) == [0, 0]
    assert output.read_bytes() == responses.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses.jsonl", "responses.jsonl.json"]


def test_generation_goes_on_behind_the_last_round(world: World, responses: Path, tmp_path: Path) -> None:
    output = tmp_path / "responses.jsonl"
    assert run_ranks(stop_in_the_third_round, 1, generate_flags(world, output)) == [75]
    partial = output.with_name("responses.jsonl.partial")
    assert not output.exists() and responses.read_bytes().startswith(partial.read_bytes())
    with partial.open("ab") as file:
        file.write(b'{"half a row')  # written, but not counted as done
    line = refusal(generate_flags(world, output, seed=77))
    assert "responses.jsonl.partial was made with seed 1234, not 77; name another file, or remove that one" in line
    assert run_ranks(pretrain, 1, generate_flags(world, output)) == [0]
    assert output.read_bytes() == responses.read_bytes()
    before = output.stat().st_mtime_ns
    assert run_ranks(pretrain, 1, generate_flags(world, output)) == [0]  # complete: nothing is made again
    assert output.stat().st_mtime_ns == before


def test_responses_train_a_student(world: World, responses: Path, tmp_path: Path) -> None:
    assert run_ranks(pretrain, 1, sft_flags(world, tmp_path / "run", conversations=responses, train_iters=2)) == [0]
    assert [record["trained_tokens"] > 50 for record in records(tmp_path / "run")] == [True, True]
