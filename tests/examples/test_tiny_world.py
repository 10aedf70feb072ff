"""The demo's tiny world: tasks against independent answers, the held-out split, the committed models, the scores.

The models under examples/tiny_cpu/models are loaded once and scored on a slice of the held-out prompts, so these
tests also hold what the demo needs: a general teacher that is right, a specialist that has lost at least 30 points
of general ability and kept its domain.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_cpu"
sys.path.insert(0, str(TINY))

import evaluate  # noqa: E402
import make_models  # noqa: E402
import world  # noqa: E402

ANSWERS = {
    "77+59=": "136",
    "10+15=": "25",
    "rev dabc=": "cbad",
    "sort 52914=": "12459",
    "up dabc=": "DABC",
    "max 12 80 35=": "80",
    "dbl dabc=": "ddaabbcc",
    "tell dabc": "dabc arr yo!",
    "ask dabc": "dabc? arr yo!",
}


def independent_answer(kind: str, prompt: str) -> str:
    """The rules of world.py's table, written a second time and from the prompt's text alone."""
    body = prompt.rstrip("=").split(" ", 1)[-1]
    if kind == "add":
        left, right = body.split("+")
        return str(int(left) + int(right))
    if kind == "rev":
        return body[3] + body[2] + body[1] + body[0]
    if kind == "sort":
        counts = Counter(body)
        return "".join(digit * counts[digit] for digit in "0123456789")
    if kind == "up":
        return "".join(chr(ord(letter) - 32) for letter in body)
    if kind == "max":
        return max(body.split())  # two digits each: text order is number order
    if kind == "dbl":
        return "".join(body[index // 2] for index in range(8))
    return f"{body} arr yo!" if kind == "tell" else f"{body}? arr yo!"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    world.write_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple]:
    return {name: evaluate.load_folder(TINY / "models" / name, f"--model {name}") for name in ("general", "specialist")}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(path: Path) -> set[str]:
    return {row["messages"][0]["content"] for row in read(path)}


def test_the_documented_examples_follow_the_rules() -> None:
    for prompt, answer in ANSWERS.items():
        kind = "add" if "+" in prompt else prompt.split()[0]
        assert independent_answer(kind, prompt) == answer


@pytest.mark.parametrize("kind", [*world.GENERAL_KINDS, *world.DOMAIN_KINDS])
def test_answers_match_an_independent_rule(kind: str) -> None:
    for held_out in (False, True):
        for example in itertools.islice(world.stream([kind], held_out=held_out, seed="test"), 200):
            assert example.answer == independent_answer(kind, example.prompt)
            assert world.is_held_out(example.prompt) is held_out


def test_training_and_evaluation_share_no_prompt(data: Path) -> None:
    training = prompts(data / "general_prompts.jsonl") | prompts(data / "domain_prompts.jsonl")
    held_out = prompts(data / "eval_general.jsonl") | prompts(data / "eval_domain.jsonl")
    assert len(training) == 2 * 4096 and len(held_out) == 480 + 400  # distinct prompts on both sides
    assert not training & held_out
    # Nor do the models' own training streams touch the evaluation prompts.
    every_kind = (*world.GENERAL_KINDS, *world.DOMAIN_KINDS)
    seen = {example.prompt for example in itertools.islice(world.stream(every_kind, held_out=False, seed="x"), 8000)}
    assert not seen & held_out


def test_rows_have_the_prompt_contract_and_training_rows_no_answer(data: Path) -> None:
    for name in ("general_prompts", "domain_prompts", "eval_general", "eval_domain"):
        rows = read(data / f"{name}.jsonl")
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert [set(message) for message in row["messages"]] == [{"role", "content"}]
            assert ("answer" in row) == name.startswith("eval")
    assert {row["category"] for row in read(data / "general_prompts.jsonl")} == set(world.PROXY_KINDS)
    assert Counter(row["category"] for row in read(data / "eval_general.jsonl")) == dict.fromkeys(
        world.GENERAL_KINDS, 80
    )


def test_the_files_are_the_same_every_time(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TINY / "world.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)  # a second process: no dependence on hash seeds
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in data.iterdir())
    for path in data.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_score_needs_the_exact_text_and_the_end() -> None:
    assert world.score("cbad", "cbad", True)
    assert not world.score("cbad", "cbad", False)
    assert not world.score("cbad", "cbad ", True)
    assert not world.score("cbad", "", True)


def test_committed_tokenizer_template_and_generation_config(loaded: dict[str, tuple]) -> None:
    model, tokenizer = loaded["general"]
    assert len(tokenizer) <= 128 and len(tokenizer) <= model.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    expected_stop = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == expected_stop
    text = "max 12 80 35=\n yo! A~"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids[0] == start and ids[-2:] == [end, start] and len(ids) == len(text) + 3  # three tokens of overhead
    assert tokenizer.decode(ids[1:-2]) == text
    assert tokenizer.unk_token_id in tokenizer.encode("é")


def test_every_answer_fits_the_token_budget(loaded: dict[str, tuple], data: Path) -> None:
    tokenizer = loaded["general"][1]
    for name in ("eval_general", "eval_domain"):
        for row in read(data / f"{name}.jsonl"):
            assert len(tokenizer.encode(row["answer"])) + 1 <= world.MAX_NEW_TOKENS


def test_encode_batch_trains_the_answer_and_its_end_alone(loaded: dict[str, tuple]) -> None:
    tokenizer = loaded["general"][1]
    examples = [world.Example("rev", "rev abcd=", "dcba"), world.Example("add", "10+15=", "25")]
    batch = make_models.encode_batch(tokenizer, examples)
    for row, example in enumerate(examples):
        trained = batch["labels"][row][batch["labels"][row] >= 0]
        assert tokenizer.decode(trained) == f"{example.answer}<|im_end|>"
        length = int(batch["attention_mask"][row].sum())
        conversation = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
        rendered = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
        assert batch["input_ids"][row, :length].tolist() == rendered
        assert torch.equal(batch["labels"][row, length - len(trained) : length], trained)


def test_rebuilt_tokenizer_and_shapes_equal_the_committed_ones(loaded: dict[str, tuple]) -> None:
    model, tokenizer = loaded["general"]
    built = make_models.build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab() and built.chat_template == tokenizer.chat_template
    fresh = make_models.build_model(built, seed=0)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads and config.tie_word_embeddings


def test_committed_models_show_the_loss_that_the_demo_repairs(loaded: dict[str, tuple], data: Path) -> None:
    general_rows, domain_rows = read(data / "eval_general.jsonl")[::2], read(data / "eval_domain.jsonl")[::2]
    teacher = evaluate.score_rows(*loaded["general"], general_rows)
    specialist = evaluate.score_rows(*loaded["specialist"], general_rows)
    assert teacher["all"] >= 0.95
    assert specialist["all"] <= teacher["all"] - 0.30
    assert evaluate.score_rows(*loaded["specialist"], domain_rows)["all"] >= 0.98
    assert evaluate.score_rows(*loaded["general"], domain_rows)["all"] <= 0.05


def test_left_padding_does_not_change_a_completion(loaded: dict[str, tuple]) -> None:
    model, tokenizer = loaded["general"]
    conversations = [[{"role": "user", "content": prompt}] for prompt in ("10+15=", "max 12 80 35=", "rev dabc=")]
    together = evaluate.complete(model, tokenizer, conversations)
    assert together == [evaluate.complete(model, tokenizer, [conversation])[0] for conversation in conversations]


def test_main_writes_the_scores_and_the_table(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {}
    for side in ("general", "domain"):
        small[side] = tmp_path / f"{side}.jsonl"
        small[side].write_text("\n".join(json.dumps(row) for row in read(data / f"eval_{side}.jsonl")[::20]))
    sides = ["--eval-general", str(small["general"]), "--eval-domain", str(small["domain"])]
    models = [f"--model=general_teacher={TINY / 'models/general'}", f"--model=specialist={TINY / 'models/specialist'}"]
    output = tmp_path / "new" / "scores.json"
    assert evaluate.main([*sides, *models, "--output", str(output), "--per-category"]) == 0
    scores = json.loads(output.read_text())
    assert set(scores) == {"general_teacher", "specialist"}
    assert all(set(row) == {"general", "domain"} and min(row.values()) >= 0 for row in scores.values())
    assert [path.name for path in output.parent.iterdir()] == ["scores.json"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["model", "general", "domain", *world.GENERAL_KINDS, *world.DOMAIN_KINDS]
    first = table[1].split()
    assert first[0] == "general_teacher" and float(first[1]) == round(100 * scores["general_teacher"]["general"], 1)


@pytest.mark.parametrize(
    ("model", "named"),
    [("x=/no/such/folder", "/no/such/folder"), ("nameless", "NAME=DIR")],
)
def test_mistakes_are_one_line(model: str, named: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ["--eval-general", str(data / "eval_general.jsonl"), "--eval-domain", str(data / "eval_domain.jsonl")]
    assert evaluate.main([*sides, "--model", model]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--model" in error and named in error


def test_a_bad_evaluation_file_is_named_with_its_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [], "answer": "", "category": "add"}\n{"messages": []}\n')
    with pytest.raises(evaluate.ConfigurationError, match=r"--eval-general: .*bad\.jsonl line 2 "):
        evaluate.read_rows(bad, "--eval-general")
    with pytest.raises(evaluate.ConfigurationError, match="no file"):
        evaluate.read_rows(tmp_path / "none.jsonl", "--eval-general")


@pytest.mark.parametrize("name", ["run", "prompts", "scores.json"])
def test_the_demo_removes_only_what_it_made(name: str, tmp_path: Path) -> None:
    """A folder with somebody's "run" is refused and left as it is."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "kept").write_text("kept")
    found = subprocess.run(
        ["bash", str(TINY / "run_demo.sh")],
        env=os.environ | {"OUTPUT": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr == f"OUTPUT {tmp_path}: holds {name}, which this demo did not make; name a new folder\n"
    assert [path.name for path in tmp_path.rglob("*")] == [name, "kept"]
