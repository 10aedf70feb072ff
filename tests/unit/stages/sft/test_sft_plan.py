"""The plan of a resumed fine-tuning run: conversations that are split now and were not when the run was saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.checkpoint.assets import assets_dir, copy_assets
from tests.support.saved_runs import STEPS, save_common_state
from tests.support.worlds import World, prepare, refusal

# Turns that were the last ones are marked, so that each of several gets a sequence of its own.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if loop.last and m.role == 'assistant' %}!{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
NONE = dict.fromkeys((
    "general_teacher_load", "general_prompts", "domain_prompts", "max_prompt_length", "max_response_length",
))  # fmt: skip


def sft_flags(world: World, folder: Path, turns: list[int]) -> list[str]:
    student = folder / "student"
    if not student.exists():
        shutil.copytree(world.student, student)
        (student / "hf" / "chat_template.jinja").write_text(MARKED)
    path = folder / "rows.jsonl"
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text("".join(json.dumps({"messages": exchange * count}) + "\n" for count in turns))
    settings: dict[str, Any] = {"stage": "sft", "save": folder / "run", "load": student, "seq_length": 64}
    return world.flags(**(NONE | settings | {"conversations": path}))


def save(flags: list[str], folder: Path, lacking: tuple[str, ...]) -> None:
    """Write the checkpoint of a run whose stream had no counts of these names."""
    plan: Any
    args, plan = prepare(flags)
    plan.stream.next_batch(args.global_batch_size)
    state = plan.state_dict()
    state["stream"] = {name: value for name, value in state["stream"].items() if name not in lacking}
    args.camopd_state = json.dumps({**state, "skipped_in_a_row": 0})
    save_common_state(folder / "run", STEPS, args)
    copy_assets(assets_dir(args.load), assets_dir(folder / "run"))


@pytest.mark.parametrize(
    ("turns", "split", "lacking"),
    [
        ([1, 2, 1, 3], 2, ("split", "turns_dropped")),
        ([2], 1, ("split",)),
        ([1, 1, 1], 0, ("split", "turns_dropped")),
        ([1, 2, 3, 2], 3, ("turns_dropped",)),
        ([2, 1], 1, ()),
    ],
)
def test_a_run_saved_before_conversations_were_split(
    world: World, tmp_path: Path, turns: list[int], split: int, lacking: tuple[str, ...]
) -> None:
    plan: Any
    flags = sft_flags(world, tmp_path, turns)
    save(flags, tmp_path, lacking)
    if split and "split" in lacking:
        line = refusal(flags)
        assert line.startswith(f"--save {tmp_path / 'run'}: was saved by a version that did not split conversations")
        assert f"with {split} of --conversations; finish it with that version, or give a new --save" in line
    else:
        args, plan = prepare(flags)
        assert args.resume and plan.stream.epochs > 0 and plan.stream.turns_dropped == 0
