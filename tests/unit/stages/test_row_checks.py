"""Before processes meet, every row goes through the chat template: once, in one process, in every stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.stages import row_checks
from megatron_camopd.stages.registry import describe_stage
from tests.support.worlds import World, prepare, refusal

NONE = dict.fromkeys(("general_teacher_load", "general_prompts", "domain_prompts"))


def exchange(question: str, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | fields],
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(world: World, folder: Path, stage: str, path: Path, **changes: Any) -> list[str]:
    """A dry run of ``stage`` with the rows of ``path``."""
    settings: dict[str, dict[str, Any]] = {
        "distill": {"domain_prompts": path},
        "generate": NONE | {"save": None, "train_iters": None, "prompts": path, "responses": folder / "out.jsonl"},
        "sft": NONE | {"max_prompt_length": None, "max_response_length": None, "seq_length": 64, "conversations": path},
    }
    return world.flags(**({"stage": stage, "save": folder / "run", "dry_run": 1} | settings[stage] | changes))


def lines(flags: list[str]) -> list[str]:
    return describe_stage(*prepare(flags)).split("\n")


FLAGS = {"distill": "--domain-prompts", "generate": "--prompts", "sft": "--conversations"}


@pytest.mark.parametrize("stage", FLAGS)
@pytest.mark.parametrize("bad", [1, 17])
def test_a_row_that_the_template_refuses(world: World, tmp_path: Path, stage: str, bad: int) -> None:
    texts = ["refuse this" if row in (bad, bad + 1) else f"say {row}" for row in range(1, 20)]
    rows = [exchange(text) if stage == "sft" else {"prompt": text} for text in texts]
    path = write(tmp_path / "rows.jsonl", rows)
    for _ in range(2):  # a refusal is not kept
        line = refusal(flags(world, tmp_path, stage, path))
        assert line.startswith(f"{FLAGS[stage]}: {path} line {bad}: the tokenizer's chat template fails for this row")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "say <|im_end|>"}, "holds '<|im_end|>' in the content of messages[0], a special token"),
        (
            {"messages": [{"role": "user", "content": "a", "mood": "good"}]},
            "has 'mood' in messages[0], which the chat template does not read",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 1}]},
            "has a weight in messages[0], a user message; only assistant messages are trained",
        ),
        (
            {"messages": [*exchange("a", weight=2)["messages"], {"role": "user", "content": "b"}]},
            "has the weight 2 in messages[1]; it must be 0 (not trained) or 1",
        ),
        (
            {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "b"}]},
            "begins with an assistant message; put a system or user message before it",
        ),
        (
            {"messages": exchange("a", reasoning_content=5)["messages"] + exchange("b")["messages"][:1]},
            "has 'reasoning_content' in messages[1], which the chat template does not read",
        ),
    ],
)
def test_prompts_whose_responses_could_not_be_trained_on(
    world: World, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    """``--stage generate`` would drop every response to them."""
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a"}, row])
    line = refusal(flags(world, tmp_path, "generate", path))
    assert line.replace(" line 2: ", " line 2 ").startswith(f"--prompts: {path} line 2 {words}")
    prepare(flags(world, tmp_path, "distill", path))


def test_empty_fields_that_the_template_does_not_read_pass(world: World, tmp_path: Path) -> None:
    empty: dict[str, Any] = {"reasoning_content": "", "mood": "", "tool_calls": [], "meta": {}}
    path = write(tmp_path / "rows.jsonl", [exchange("a", **empty)])
    prepare(flags(world, tmp_path, "sft", path))


@pytest.mark.parametrize(("rows", "count"), [([1], 1), ([0, 3, 4], 3)])
def test_special_tokens_of_prompts_are_said(world: World, tmp_path: Path, rows: list[int], count: int) -> None:
    texts = [f"say <|im_end|> {row}" if row in rows else f"say {row}" for row in range(6)]
    path = write(tmp_path / "rows.jsonl", [{"prompt": text} for text in texts])
    line = f"domain prompts: {count} rows hold special tokens, which are encoded as such"
    assert line in lines(flags(world, tmp_path, "distill", path))
    found = lines(flags(world, tmp_path, "distill", write(path, [{"prompt": "say"}] * 6)))
    assert not [line for line in found if "special tokens" in line]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{{ message.content }}", "x", "the chat template leaves out the content of messages[0]; change the row"),
        ("in messages", "in messages[1:]", "the chat template leaves out the content of messages[0]; change the row"),
        ("if tools", "if false", "has 'tools', which the chat template does not read, so it would have no effect"),
    ],
)
def test_prompts_of_which_something_would_vanish(world: World, tmp_path: Path, old: str, new: str, words: str) -> None:
    student = Path(shutil.copytree(world.student, tmp_path / "student"))
    template = student / "hf" / "chat_template.jinja"
    text = template.read_text()
    assert old in text
    template.write_text(text.replace(old, new).replace("tools | tojson", "1"))
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    for row in (
        {"messages": messages, "tools": [{"name": "f"}]},
        {"messages": messages[::-1], "tools": [{"type": "g"}]},
    ):
        path = write(tmp_path / "rows.jsonl", [{"prompt": "x"}, row] if "tools" in words else [row])
        line = refusal(flags(world, tmp_path, "distill", path, load=student, general_prompts=path))
        number = 2 if "tools" in words else 1
        assert line.startswith(f"--general-prompts: {path} line {number}: {words}")


def test_prompts_in_the_dry_run(world: World, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "x" * length} for length in (3, 40, 100, 5)])
    found = lines(flags(world, tmp_path, "distill", path, max_prompt_length=30))
    words = "domain prompts: 4 rows, longest 117 tokens, 2 longer than --max-prompt-length (cut on the left); "
    assert any(line.startswith(words) for line in found)
    found = lines(flags(world, tmp_path, "generate", path, max_prompt_length=70, overlong_prompts="skip"))
    assert "prompts: 4 rows, longest 117 tokens, 1 longer than --max-prompt-length (left out); 1 rounds of 4" in found
    for stage, flag, count in (("distill", "--general-prompts", 20), ("generate", "--prompts", 4)):
        line = refusal(flags(world, tmp_path, stage, path, max_prompt_length=10, overlong_prompts="skip"))
        assert line.startswith(f"{flag}: all {count} prompts are longer than --max-prompt-length; raise it, or cut")


def test_conversations_in_the_dry_run(world: World, tmp_path: Path) -> None:
    rows = [exchange("x" * length, name="n") for length in (3, 60, 4)] + [exchange("a", "b" * 70)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = lines(flags(world, tmp_path, "sft", path, validation_conversations=path, eval_interval=1))
    words = (
        "4 rows, longest 90 tokens, 2 longer than --seq-length (cut on the right), 1 with nothing left to train "
        "(left out)"
    )
    unread = "3 messages have a `name`, which the chat template does not read"
    for name in ("conversations", "validation conversations"):
        assert f"{name}: {words}" in found and f"{name}: {unread}" in found


@pytest.mark.parametrize("stage", FLAGS)
def test_fields_that_are_not_read_in_the_dry_run(world: World, tmp_path: Path, stage: str) -> None:
    rows = [exchange(f"say {n}") if stage == "sft" else {"prompt": f"say {n}"} for n in range(5)]
    path = write(
        tmp_path / "rows.jsonl", [row | {"source": "x"} | ({"score": 1} if n else {}) for n, row in enumerate(rows)]
    )
    name = {"distill": "domain prompts", "generate": "prompts", "sft": "conversations"}[stage]
    for _ in range(2):  # also if the result is kept
        assert f"{name}: not read: source (5 rows), score (4 rows)" in lines(flags(world, tmp_path, stage, path))
    write(path, rows)
    assert not [line for line in lines(flags(world, tmp_path, stage, path)) if "not read" in line]


@pytest.mark.parametrize("overlong", ["truncate-right", "skip"])
@pytest.mark.parametrize("flag", ["conversations", "validation_conversations"])
def test_conversations_of_which_nothing_can_be_trained(world: World, tmp_path: Path, overlong: str, flag: str) -> None:
    good = write(tmp_path / "good.jsonl", [exchange("a")])
    for count in (1, 3):
        path = write(tmp_path / "long.jsonl", [exchange("x" * (90 + row)) for row in range(count)])
        line = refusal(flags(world, tmp_path, "sft", good, **{flag: path, "overlong_conversations": overlong}))
        assert line.startswith(f"--{flag.replace('_', '-')}: not one of the {count} conversations ")
    assert not (tmp_path / "run").exists()


def test_the_same_rows_are_encoded_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"say {row}"} for row in range(9)])
    first = lines(flags(world, tmp_path, "generate", path))
    check_rows, asked = row_checks.check_rows, []

    def counting(check: Any, rows: Any, **settings: Any) -> Any:
        asked.append(len(rows))
        return check_rows(check, rows, **settings)

    monkeypatch.setattr(row_checks, "check_rows", counting)
    assert lines(flags(world, tmp_path, "generate", path)) == first and asked == []
    lines(flags(world, tmp_path, "generate", path, max_prompt_length=39))
    lines(flags(world, tmp_path, "generate", path, chat_template_kwargs='{"thinking": true}'))
    lines(flags(world, tmp_path, "generate", path, overlong_prompts="skip"))
    assert asked == [9, 9, 9]
    write(path, [{"prompt": f"tell {row}"} for row in range(9)])
    lines(flags(world, tmp_path, "generate", path))
    assert asked == [9, 9, 9, 9]
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("damaged")
    lines(flags(world, tmp_path, "generate", path))
    assert len(asked) == 5


def test_another_template_is_another_check(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    student = Path(shutil.copytree(world.student, tmp_path / "student"))
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "please"}])
    prepare(flags(world, tmp_path, "generate", path, load=student))
    template = student / "hf" / "chat_template.jinja"
    template.write_text(template.read_text().replace("refuse this", "please"))
    line = refusal(flags(world, tmp_path, "generate", path, load=student))
    assert line.startswith(f"--prompts: {path} line 2: the tokenizer's chat template fails")


def test_one_process_checks(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "refuse this"}])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        line = flags(world, tmp_path, "generate", path, dry_run=None)
        if rank == "0":
            with pytest.raises(ConfigurationError, match="line 2: the tokenizer's chat template fails"):
                prepare(line)
        else:
            plan: Any = prepare(line)[1]
            assert plan.report is None
