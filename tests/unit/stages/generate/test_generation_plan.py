"""The end of ``--stage generate``: killed at any moment, the same command goes on, and nothing is lost or left over."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.stages.generate.plan import GeneratePlan
from tests.support.worlds import World, prepare, refusal

ROWS = b'{"id": "0", "messages": []}\n' * 20
COUNTS = {"rounds": 4, "prompts": 20, "written": 20, "tokens": 70, "bytes": len(ROWS)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "responses.jsonl"


def flags(world: World, output: Path, **changes: Any) -> list[str]:
    values = {
        "stage": "generate", "save": None, "train_iters": None, "load": world.teacher, "prompts": world.general,
        "responses": output, "global_batch_size": 6, "max_response_length": 12, "general_teacher_load": None,
        "general_prompts": None, "domain_prompts": None,
    }  # fmt: skip
    return world.flags(**(values | changes))


def plan_of(world: World, output: Path) -> GeneratePlan:
    _, plan = prepare(flags(world, output))
    assert isinstance(plan, GeneratePlan)
    return plan


def names(output: Path) -> list[str]:
    return sorted(path.name.removeprefix("responses.jsonl") for path in output.parent.iterdir())


def write_all_rounds(plan: GeneratePlan) -> None:
    plan.partial.write_bytes(ROWS)
    plan.note(COUNTS)


def assert_complete(world: World, output: Path) -> None:
    """Plan and end again: the output is there with its manifest, and nothing else."""
    plan = plan_of(world, output)
    assert plan.done == COUNTS
    plan.finish(plan.done)
    assert names(output) == ["", ".json"] and output.read_bytes() == ROWS
    assert json.loads(output.with_name("responses.jsonl.json").read_text())["counts"] == COUNTS
    assert plan_of(world, output).complete


def test_every_moment_of_the_end(world: World, output: Path) -> None:
    """All that the end does, in its order, undone from the last step on; each state is one that a kill leaves."""
    plan = plan_of(world, output)
    partial, final = output.with_name("responses.jsonl.partial.json"), output.with_name("responses.jsonl.json")
    write_all_rounds(plan)
    states = [{path.name: path.read_bytes() for path in (plan.partial, partial)}]  # before the end
    noted = partial.read_bytes()
    states.append(states[0] | {final.name: noted})  # the manifest was written
    states.append({output.name: ROWS, final.name: noted, partial.name: noted})  # the output was renamed
    states.append({output.name: ROWS, final.name: noted})  # the partial manifest was removed
    states.append({output.name: ROWS, partial.name: noted})  # what earlier versions left
    for state in states:
        for path in output.parent.iterdir():
            path.unlink()
        for name, content in state.items():
            (output.parent / name).write_bytes(content)
        assert_complete(world, output)


def test_the_manifest_is_there_before_the_output(world: World, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is cut off before each call that changes a file's name, in turn, until it gets through."""
    import os

    replace = os.replace
    for allowed in range(3):
        plan = plan_of(world, output)
        if not plan.complete:
            write_all_rounds(plan)
        left = [allowed]

        def counted(source: Any, target: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            try:
                plan.finish(COUNTS)
            except KeyboardInterrupt:
                assert not output.exists()
        assert not output.exists() or ".json" in names(output)
    assert_complete(world, output)


@pytest.mark.parametrize(
    ("counts", "rows", "words"),
    [
        (COUNTS, ROWS[:-3], f"responses.jsonl.partial has {len(ROWS) - 3} bytes, {len(ROWS)} were written"),
        (COUNTS | {"bytes": "many"}, ROWS, "does not say what it was made from"),
        (COUNTS | {"rounds": -1}, ROWS, "does not say what it was made from"),
        (COUNTS | {"tokens": True}, ROWS, "does not say what it was made from"),
        ({}, ROWS, "were written; it was changed since"),
    ],
)
def test_what_was_changed_is_refused(
    world: World, output: Path, counts: dict[str, Any], rows: bytes, words: str
) -> None:
    plan = plan_of(world, output)
    plan.partial.write_bytes(rows)
    plan.note(counts)
    assert words in refusal(flags(world, output))
    assert plan.partial.read_bytes() == rows


def test_a_complete_output_that_was_changed_is_refused(world: World, output: Path) -> None:
    plan = plan_of(world, output)
    write_all_rounds(plan)
    plan.finish(COUNTS)
    output.write_bytes(ROWS + b"{}\n")
    assert f"responses.jsonl has {len(ROWS) + 3} bytes, {len(ROWS)} were written" in refusal(flags(world, output))
