"""The chat template must end the assistant's turn with an end-of-sequence id; every stage looks before it starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.data import check_end_of_sequence
from megatron_camopd.data.end_of_sequence import named_ids
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import CHATML, World, make_tokenizer, prepare, refusal

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}END{% endfor %}"
SYSTEM_ONLY = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}<|endoftext|>"
SWITCH = TURN.replace("END", "{% if ended %}<|im_end|>{% else %}\n\n{% endif %}")


def check(template: str | None, ids: list[int], **template_kwargs: Any) -> None:
    check_end_of_sequence(
        make_tokenizer(chat_template=template), ids, source="generation_config.json", template_kwargs=template_kwargs
    )


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        (CHATML, [2]),
        (CHATML, [0, 2]),
        (TURN.replace("END", "<|endoftext|>"), [0]),
        (TURN.replace("END", "\n<|im_end|>\n"), [2]),
        (TURN.replace("END", "<|endoftext|>"), [0, 1]),
        (None, [0]),  # a base model: text is continued, nothing says where it ends
        (SYSTEM_ONLY, [2]),  # left to the rows
        ("{{ messages | length }} messages", [2]),
        ("{{ no_such_function() }}", [0]),
    ],
)
def test_templates_that_serve_or_cannot_be_judged(template: str | None, ids: list[int]) -> None:
    check(template, ids)


@pytest.mark.parametrize(
    ("template", "ids", "named", "written"),
    [
        (CHATML, [0], "0 ('<|endoftext|>')", "writes '<|im_end|>' after"),
        (CHATML, [0, 1], "0 ('<|endoftext|>'), 1 ('<|im_start|>')", "writes '<|im_end|>' after"),
        (TURN.replace("END", ""), [2], "2 ('<|im_end|>')", "writes nothing"),
        (TURN.replace("END", "\n"), [0, 2, 9999], "0 ('<|endoftext|>'), 2 ('<|im_end|>'), 9999 (no token)", "'\\n'"),
    ],
)
def test_a_template_that_ends_otherwise_is_refused(template: str, ids: list[int], named: str, written: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(template, ids)
    line = str(caught.value)
    assert line.startswith(f"generation_config.json: eos_token_id names {named}, but the chat template ")
    assert written in line and "\n" not in line


def test_the_template_gets_the_variables_of_the_run() -> None:
    check(SWITCH, [2], ended=True)
    with pytest.raises(ConfigurationError, match="names 2"):
        check(SWITCH, [2], ended=False)


def test_many_ids_are_cut_short() -> None:
    assert named_ids(make_tokenizer(), list(range(3, 30))).endswith(" and 19 more")


def stage_flags(world: World, stage: str, student: Path, folder: Path) -> list[str]:
    prompts = dict.fromkeys(("general_teacher_load", "general_prompts", "domain_prompts"))
    conversations = folder / "conversations.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    conversations.write_text(json.dumps(row) + "\n")
    changes: dict[str, dict[str, Any]] = {
        "distill": {},
        "sft": prompts | {"max_prompt_length": None, "max_response_length": None, "seq_length": 64,
                          "conversations": conversations},
        "generate": prompts | {"save": None, "train_iters": None, "prompts": world.general,
                               "responses": folder / "responses.jsonl"},
    }  # fmt: skip
    return world.flags(**({"stage": stage, "load": student, "save": folder / "run"} | changes[stage]))


@pytest.mark.parametrize("stage", ["distill", "sft", "generate"])
def test_every_stage_looks_before_it_starts(stage: str, world: World, tmp_path: Path) -> None:
    student = Path(shutil.copytree(world.student, tmp_path / "student"))
    line = stage_flags(world, stage, student, tmp_path)
    prepare(line)
    generation, config = student / "hf" / "generation_config.json", student / "hf" / "config.json"
    for path, ids in ((generation, 0), (config, [1, 0])):
        generation.unlink(missing_ok=True)
        before = config.read_text()
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | {"eos_token_id": ids}))
        assert refusal(line).startswith(f"{path}: eos_token_id names 0 ('<|endoftext|>')")
        config.write_text(before)
    generation.write_text(json.dumps({"eos_token_id": [0, 2]}))
    prepare(line)
    assert not (tmp_path / "run").exists()
