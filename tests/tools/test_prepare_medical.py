"""``prepare_prompts.py medical``: the template, the counts, and no gold answer in a prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.data import read_prompts
from tools.prepare_prompts import main
from tools.prompt_preparation import medical
from tools.prompt_preparation.medical import CHOICE, OPEN, SYSTEM, Question, leak, options_in

EXPLANATION = "Because the enzyme of case {} is inhibited by the drug that the patient took for months"
COUNTS = {"medmcqa": 8, "medreason": 6, "medical-r1": 4, "m23k": 2}


def medmcqa(number: int) -> dict[str, Any]:
    return {
        "id": f"id-{number}", "question": f"Which drug suits patient {number}?", "opa": "aspirin", "opb": "heparin",
        "opc": "insulin", "opd": "none", "cop": 2, "choice_type": "single", "exp": EXPLANATION.format(number) + ". C",
        "subject_name": "x", "topic_name": None,
    }  # fmt: skip


def medreason(number: int) -> dict[str, Any]:
    options = "Answer Choices:\nA. the liver\nB. the spleen\nC. the kidney of the left side\nD. the heart"
    return {
        "dataset_name": "medqa", "id_in_dataset": number, "question": f"Which organ fails in case {number}?",
        "answer": f"The kidney. Explanation: {EXPLANATION.format(number)}.", "reasoning": "Finding paths: ...",
        "options": None if number % 4 == 3 else options,
    }  # fmt: skip


def medical_r1(number: int) -> dict[str, Any]:
    return {
        "question": f"What is the treatment of condition {number}?",
        "reasoning (reasoning_content)": f"Okay. {EXPLANATION.format(number)}.",
        "response (content)": f"The treatment: {EXPLANATION.format(-number)}.",
    }


def m23k(number: int) -> dict[str, Any]:
    return {
        "prompt": f"Which sign is typical of disease {number}?\nA. fever\nB. rash\nC. cough\nD. pallor",
        "reasoning": EXPLANATION.format(number), "distilled_answer_string": f"(B) {EXPLANATION.format(-number)}",
        "answer_letter": "B", "answer_string": "rash", "source": "x", "metadata": "{}", "text": "everything SECRET",
    }  # fmt: skip


MAKERS = {"medmcqa": medmcqa, "medreason": medreason, "medical-r1": medical_r1, "m23k": m23k}


def write(folder: Path, *, step: int = 1, **extra: list[dict[str, Any]]) -> dict[str, Path]:
    """A file for each source with 12 rows, or those of ``extra`` (by name with _) before them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, make in MAKERS.items():
        rows = [*extra.get(name.replace("-", "_"), []), *(make(number) for number in range(12))][::step]
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def run(paths: dict[str, Path], output: Path, *flags: str, counts: dict[str, int] | None = None) -> int:
    given = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    given += [word for name, count in (counts or COUNTS).items() for word in (f"--{name}-count", str(count))]
    return main(["medical", "--output", str(output), *given, *flags])


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]


def test_the_template_and_the_counts(tmp_path: Path) -> None:
    assert run(write(tmp_path / "in"), tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    assert {name: sum(row["category"] == name for row in rows) for name in COUNTS} == COUNTS
    assert all(row["messages"][0] == {"role": "system", "content": SYSTEM} for row in rows)
    assert SYSTEM.startswith("You are a careful medical reasoning assistant. Provide educational medical information,")
    text = {row["id"]: row["messages"][1]["content"] for row in rows}
    number = next(identity for identity in text if identity.startswith("medmcqa")).rsplit("-", 1)[1]
    assert text[f"medmcqa-id-{number}"] == (
        f"Which drug suits patient {number}?\nA. aspirin\nB. heparin\nC. insulin\nD. none\n"
        "Please reason step by step and give the final answer choice at the end."
    )
    for row in rows:
        asked = row["messages"][1]["content"]
        has_options = row["category"] != "medical-r1" and not ("Which organ" in asked and "liver" not in asked)
        assert asked.endswith("\n" + (CHOICE if has_options else OPEN)), asked
        assert "enzyme" not in asked and "Explanation" not in asked and "SECRET" not in asked
    assert any("kidney of the left side\nD. the heart\n" in asked for asked in text.values())
    assert len(read_prompts([tmp_path / "out" / "prompts.jsonl"], flag="--domain-prompts").prompts) == 20
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["row_ids"] == [row["id"] for row in rows]
    assert manifest["counts"]["medmcqa"] == {
        "asked for": 8, "duplicates of kept questions": 0, "rows": 12, "sampled": 8,
    }  # fmt: skip


def test_the_same_bytes_twice_and_in_another_order(tmp_path: Path) -> None:
    paths, other = write(tmp_path / "in"), write(tmp_path / "other", step=-1)
    assert run(paths, tmp_path / "a") == run(paths, tmp_path / "b") == run(other, tmp_path / "c") == 0
    for name in ("prompts.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    texts = [[row["messages"] for row in read(tmp_path / name)] for name in "ac"]
    assert texts[0] == texts[1]


def test_duplicates_within_and_across_sources(tmp_path: Path) -> None:
    again = [
        medmcqa(number) | {"id": f"z{number}", "question": f"WHICH drug  suits patient {number}??"}
        for number in range(12)
    ]
    same = [medreason(0) | {"question": f"Which drug suits patient {number}?"} for number in range(12)]
    inside = [m23k(number) | {"prompt": f"Which drug suits patient {number}?\n\nA. one\nB. two"} for number in range(3)]
    inside += [m23k(3) | {"prompt": "Which drug suits patient 3?\nAnswer Choices: (A) one (B) two (C) three"}]
    paths = write(tmp_path / "in", medmcqa=again, medreason=same, m23k=inside)
    assert run(paths, tmp_path / "out", counts=COUNTS | {"medmcqa": 12}) == 0
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["medmcqa"]["duplicates of kept questions"] == 12 and counts["medmcqa"]["rows"] == 24
    assert counts["medreason"]["in an earlier source"] == 12
    assert counts["m23k"]["in an earlier source"] == 4


@pytest.mark.parametrize(
    ("text", "stem", "options"),
    [
        ("Why?\nA. one\nB) two\n(C) three", "Why?", ["one", "two", "three"]),
        ("Why?\nAnswer Choices: (A) one (B) two", "Why?", ["one", "two"]),
        ("Why does hepatitis A. differ?", "Why does hepatitis A. differ?", []),
        ("Vitamin (A) or (C)?", "Vitamin (A) or (C)?", []),
        ("(A) is listed, (B) is not?", "", ["is listed,", "is not?"]),
    ],
)
def test_options_inside_a_question(text: str, stem: str, options: list[str]) -> None:
    found, inside = options_in(text)
    assert (found, [option for _, option in inside]) == (stem, options)
    assert Question(text, [], [], "").key
    assert Question(text, [], [], "").prompt.endswith(CHOICE if options else OPEN)


def test_questions_that_hold_their_answer_are_replaced(tmp_path: Path) -> None:
    bad = [medmcqa(90) | {"question": "Which drug? Answer: B"},
           medmcqa(91) | {"question": "Which? Explanation: it is plain"}]  # fmt: skip
    told = medreason(3) | {"question": "Is it glomerulonephritis in case 92?", "answer": "Glomerulonephritis"}
    paths = write(tmp_path / "in", medmcqa=bad, medreason=[told])
    assert run(paths, tmp_path / "out", counts=COUNTS | {"medmcqa": 12, "medreason": 12}) == 0
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["medmcqa"]["question holds its answer"] == 2 and counts["medmcqa"]["sampled"] == 12
    assert counts["medreason"]["question holds its answer"] == 1


@pytest.mark.parametrize("planted", ["explanation", "answer letter", "open answer", "system"])
def test_gold_planted_behind_the_selection_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], planted: str
) -> None:
    row_of = medical._row

    def leaking(identifier: str, question: Question) -> dict[str, Any]:
        row = row_of(identifier, question)
        user = row["messages"][1]
        if planted == "explanation" and identifier.startswith("medical-r1"):
            user["content"] += "\n" + question.explanations[0].upper()
        if planted == "answer letter" and identifier.startswith("m23k"):
            user["content"] += "\nThe correct answer is (B)."
        if planted == "open answer" and not question.is_choice and question.answer:
            user["content"] += f"\nHint: {question.answer}"
        if planted == "system":
            row["messages"][0]["content"] += " Think of the enzyme."
        return row

    monkeypatch.setattr(medical, "_row", leaking)
    assert run(write(tmp_path / "in"), tmp_path / "out", counts=COUNTS | {"medreason": 12}) == 2
    assert "holds a gold answer or explanation" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial.state.json"]


def test_what_counts_as_gold() -> None:
    choice = Question("Which organ?", [("A", "the liver"), ("B", "the kidney")], [EXPLANATION.format(1)], "the kidney")
    assert leak(choice.prompt, choice) is None  # the answer is one of the options by nature
    assert leak(choice.prompt + EXPLANATION.format(1), choice) is not None
    repeated = Question(EXPLANATION.format(2) + ": which drug?", [], [f"He says: {EXPLANATION.format(2)}."], "warfarin")
    assert leak(repeated.prompt, repeated) is None  # reasoning that repeats the question gives nothing away
    assert leak(repeated.prompt + " Warfarin", repeated) == "warfarin"
    assert leak(repeated.prompt + " Warfarinum", repeated) is None  # whole words


def test_an_interrupted_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write(tmp_path / "in")
    assert run(paths, tmp_path / "whole") == 0
    sample, begun = medical._sample, []

    def interrupted(args: Any, name: str, *others: Any) -> Any:
        begun.append(name)
        if begun == ["medmcqa", "medreason", "medical-r1"]:
            raise KeyboardInterrupt
        return sample(args, name, *others)

    monkeypatch.setattr(medical, "_sample", interrupted)
    assert run(paths, tmp_path / "out") == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial.state.json"]
    assert run(paths, tmp_path / "out") == 0
    assert begun[3:] == ["medical-r1", "m23k"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "prompts.jsonl"]
    for name in ("prompts.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "flags", "text"),
    [
        ({"medmcqa": [{"query": "x"}]}, [], "--medmcqa: "),
        ({}, ["--medmcqa-count", "13"], "has 12 distinct usable questions in 12 rows; ask for fewer"),
        ({}, ["--m23k-count", "-1"], "--m23k-count -1: must be at least 0"),
        ({}, ["--revision", "abc"], "--revision abc: which of"),
        ({}, ["--medmcqa", "nowhere.jsonl"], "does not exist"),
        ({}, ["--max-characters", "10"], "has 0 distinct usable questions"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], flags: list[str], text: str
) -> None:
    assert run(write(tmp_path / "in", **changes), tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("prepare_prompts.py: error: --") and text in error
    assert not (tmp_path / "out" / "prompts.jsonl").exists()


def test_a_source_that_is_left_out_is_not_opened(tmp_path: Path) -> None:
    paths = write(tmp_path / "in")
    paths["m23k"] = tmp_path / "nowhere.jsonl"
    assert run(paths, tmp_path / "out", counts=COUNTS | {"m23k": 0}) == 0
