"""The replication's tiny world: answers by hand, the three splits, the proxy's coverage, the committed models.

The models under examples/toy_replication/models are scored once on a slice of the validation prompts, so these tests
also hold what the replication needs: a general teacher that is right everywhere, and a specialist that keeps its
domain and 58-77% of the general score, as the paper's specialists do.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REPLICATION, TINY = EXAMPLES / "toy_replication", EXAMPLES / "tiny_cpu"
sys.path[:0] = [str(REPLICATION), str(TINY)]

import evaluate  # noqa: E402
import make_models  # noqa: E402
import replication_world as replication  # noqa: E402
import world  # noqa: E402

BY_HAND = {
    "up": ("up dabc=", "DABC"),
    "rev": ("rev dabc=", "cbad"),
    "dbl": ("dbl dabc=", "ddaabbcc"),
    "swap": ("swap dabc=", "adcb"),
    "sort": ("sort 52914=", "12459"),
    "max": ("max 12 80 35=", "80"),
    "add": ("77+59=", "136"),
    "sub": ("85-37=", "48"),
    "tell": ("tell dabc", "dabc arr yo!"),
    "~up": ("~up dabc", "DABC arr!"),
    "~sort": ("~sort 52914", "12459 arr!"),
    "plain-tell": ("tell dabc", "dabc"),
    "plain-~up": ("~up dabc", "DABC"),
    "plain-~sort": ("~sort 52914", "12459"),
}
PROXY_SHARE = {"up": 1, "rev": 1, "sub": 1, "add": 2}  # in fifths of the general training prompts


class Scripted:
    """Stands in for ``random.Random``: hands out the values that a hand-written example was drawn with."""

    def __init__(self, prompt: str) -> None:
        digits = "".join(symbol if symbol.isdigit() else " " for symbol in prompt)
        self.word = prompt.rstrip("=").split(" ")[-1]
        self.numbers = [int(number) for number in digits.split()]

    def choices(self, population: str, *, k: int) -> list[str]:
        assert len(self.word) == k and set(self.word) <= set(population)
        return list(self.word)

    def randint(self, low: int, high: int) -> int:
        number = self.numbers.pop(0)
        assert low <= number <= high
        return number


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    replication.write_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple]:
    names = ("general", "specialist")
    return {name: evaluate.load_folder(REPLICATION / "models" / name, f"--model {name}") for name in names}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in read(path)]


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_answer_of_every_task_by_hand(kind: str) -> None:
    prompt, answer = BY_HAND[kind]
    assert replication.TASKS[kind](Scripted(prompt)) == (prompt, answer)  # type: ignore[arg-type]


def test_every_kind_has_an_example_by_hand() -> None:
    kinds = (*replication.GENERAL_KINDS, *replication.DOMAIN_KINDS, *replication.PLAIN_KINDS)
    assert set(BY_HAND) == set(kinds) and len(set(kinds)) == len(kinds)


def test_subtraction_is_never_negative_and_swaps_its_operands_when_needed() -> None:
    assert replication.TASKS["sub"](Scripted("37-85=")) == ("85-37=", "48")  # type: ignore[arg-type]


def test_training_validation_and_test_share_no_prompt(data: Path) -> None:
    splits: dict[str, list[str]] = {}
    for side in ("general", "domain"):
        splits[f"training {side}"] = prompts(data / f"{side}_prompts.jsonl")
        for split in ("valid", "test"):
            splits[f"{split} {side}"] = prompts(data / f"{split}_{side}.jsonl")
    everything = [prompt for rows in splits.values() for prompt in rows]
    assert len(everything) == len(set(everything)) == 2 * 4096 + 2 * (8 + 3) * 100
    for name, rows in splits.items():
        assert {world.is_held_out(prompt) for prompt in rows} == {not name.startswith("training")}


def test_the_models_own_training_meets_no_held_out_prompt(data: Path) -> None:
    held_out = {prompt for path in data.glob("[tv]*_*.jsonl") for prompt in prompts(path)}
    kinds = (*replication.GENERAL_KINDS, *replication.DOMAIN_KINDS, *replication.PLAIN_KINDS)
    training = world.distinct(kinds, 6000, held_out=False, seed="any", tasks=replication.TASKS)
    assert len(held_out) == 2200 and not held_out & {example.prompt for example in training}


def test_training_rows_carry_no_answer_and_held_out_rows_the_right_one(data: Path) -> None:
    assert len(list(data.iterdir())) == 6
    for side, kinds in (("general", replication.GENERAL_KINDS), ("domain", replication.DOMAIN_KINDS)):
        for row in read(data / f"{side}_prompts.jsonl"):
            assert set(row) == {"id", "messages", "category"}
            assert [set(message) for message in row["messages"]] == [{"role", "content"}]
            assert [message["role"] for message in row["messages"]] == ["user"]
        for split in ("valid", "test"):
            rows = read(data / f"{split}_{side}.jsonl")
            assert Counter(row["category"] for row in rows) == dict.fromkeys(kinds, 100)
            assert len({row["id"] for row in rows}) == len(rows)
            for row in rows:
                prompt = row["messages"][0]["content"]
                assert replication.TASKS[row["category"]](Scripted(prompt)) == (prompt, row["answer"])  # type: ignore


def test_the_proxy_covers_half_of_the_tasks_in_fifths(data: Path) -> None:
    counts = Counter(row["category"] for row in read(data / "general_prompts.jsonl"))
    assert set(counts) == set(PROXY_SHARE) == set(replication.PROXY_KINDS)
    assert len(counts) == len(replication.GENERAL_KINDS) // 2
    # A repeated draw is left out, which thins the kinds with few prompts: addition, about 7,300 of them, by 1 in 9.
    for kind, count in counts.items():
        assert abs(count / 4096 - PROXY_SHARE[kind] / 5) < 0.03, kind
    domain = Counter(row["category"] for row in read(data / "domain_prompts.jsonl"))
    assert set(domain) == set(replication.DOMAIN_KINDS)
    for kind, count in domain.items():
        assert abs(count / 4096 - 1 / 3) < 0.03, kind


def test_the_files_are_the_same_every_time(data: Path, tmp_path: Path) -> None:
    replication.write_prompts(tmp_path)
    for path in data.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_committed_tokenizers_are_the_demos(loaded: dict[str, tuple]) -> None:
    built = make_models.build_tokenizer()
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name, (model, tokenizer) in loaded.items():
        for file in files:
            theirs = (TINY / "models" / name / file).read_bytes()
            assert (REPLICATION / "models" / name / file).read_bytes() == theirs, f"{name}/{file}"
        assert tokenizer.get_vocab() == built.get_vocab() and tokenizer.chat_template == built.chat_template
        fresh = make_models.build_model(built, seed=0)
        assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
        assert sum(path.stat().st_size for path in (REPLICATION / "models" / name).iterdir()) <= 2_000_000


def test_every_prompt_and_answer_fits_the_replications_lengths(loaded: dict[str, tuple], data: Path) -> None:
    tokenizer = loaded["general"][1]
    for path in data.iterdir():
        for row in read(path):
            ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=True)
            assert len(ids["input_ids"]) <= 32
            assert len(tokenizer.encode(row.get("answer", ""))) + 1 <= world.MAX_NEW_TOKENS


def test_committed_models_keep_what_the_replication_needs(loaded: dict[str, tuple], data: Path) -> None:
    general_rows, domain_rows = read(data / "valid_general.jsonl")[::2], read(data / "valid_domain.jsonl")[::2]
    teacher = evaluate.score_rows(*loaded["general"], general_rows)
    specialist = evaluate.score_rows(*loaded["specialist"], general_rows)
    assert teacher["all"] >= 0.95
    assert 0.58 <= specialist["all"] / teacher["all"] <= 0.77
    lost = [kind for kind in replication.GENERAL_KINDS if specialist[kind] <= teacher[kind] - 0.10]
    assert len(lost) >= 4 and set(lost) & set(replication.PROXY_KINDS) and set(lost) - set(replication.PROXY_KINDS)
    assert evaluate.score_rows(*loaded["specialist"], domain_rows)["all"] >= 0.95
    assert evaluate.score_rows(*loaded["general"], domain_rows)["all"] <= 0.05  # plain answers are not the domain's
