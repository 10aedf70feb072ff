"""``prepare_prompts.py coser``: ranking, hold-out by scene, and the check that finds planted violations."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.data import ConversationSet, read_prompts
from megatron_camopd.errors import ConfigurationError
from tools.prepare_prompts import main
from tools.prompt_preparation import coser

OPENING = "===Conversation Start===\n\n"


def line(scene: int, turn: int) -> str:
    return f"This is what is said in scene number {scene} at its turn {turn}, with *a gesture* and (a thought)."


def conversation(scene: int, turns: int, *, character: str = "Anna", other: str = "Boris", merged: bool = False) -> Any:
    """``turns`` alternating lines of two characters, from ``character``'s side; ``merged``: two lines a turn."""
    entries = [{"from": "system", "value": f"You are {character}. Your role is to be {character} in scene {scene}."}]
    entries.append({"from": "human", "value": OPENING})
    said: list[dict[str, str]] = []
    for turn in range(turns):
        speaker = ("Anna", "Boris")[turn // (2 if merged else 1) % 2]
        text = f"{speaker}: {line(scene, turn)}" if speaker != character else line(scene, turn)
        role = "assistant" if speaker == character else "human"
        if said and said[-1]["from"] == role:
            said[-1]["value"] += "\n\n" + text
        else:
            said.append({"from": role, "value": text})
    return {"conversations": entries + said}


def rows() -> list[Any]:
    found = [conversation(scene, 4 + scene % 5) for scene in range(20)]
    found[3], found[11] = conversation(3, 14), conversation(11, 12)
    found.append(conversation(3, 14, character="Boris", other="Anna"))  # the other side of held-out scene 3
    found.append(conversation(11, 9, merged=True))  # part of scene 11, lines joined
    world = conversation(50, 16)
    world["conversations"][0]["value"] = "You are a world model for Anna and Boris."
    names = [{"from": "system", "value": "Predict."}, {"from": "human", "value": line(60, 0)},
             {"from": "assistant", "value": "Anna"}, {"from": "human", "value": line(60, 1)},
             {"from": "assistant", "value": "Boris"}]  # fmt: skip
    mute = [{"from": "system", "value": "s"}, {"from": "human", "value": line(70, 0)}]
    return [*found, world, {"conversations": names}, {"conversations": mute}]


def write(path: Path, found: list[Any]) -> Path:
    path.write_text(json.dumps(found, indent=1))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("coser") / "sft_conversations_sharegpt.json", rows())


def prepare(source: Path, output: Path, *flags: object) -> int:
    return main(["coser", "--source", str(source), "--output", str(output), "--held-out", "3", *map(str, flags)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_the_longest_are_held_out_with_their_scenes(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "out") == 0
    prompts, sft = read(tmp_path / "out" / "heldout_prompts.jsonl"), read(tmp_path / "out" / "sft.jsonl")
    # 14 turns: both sides of scene 3, the earlier row first; 12: scene 11.
    assert [row["id"].split(":")[1] for row in prompts] == ["4", "12", "21"]
    first = [(message["role"], message["content"]) for message in prompts[0]["messages"]]
    assert first[1] == ("user", OPENING) and first[2] == ("assistant", line(3, 0))
    assert first[-1] == ("user", "Boris: " + line(3, 11)) and len(first) == 2 + 12  # before the last assistant turn
    assert len(sft) == 18 and not any(f"scene number {held} " in json.dumps(row) for row in sft for held in (3, 11))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {
        "rows": 25, "turns of the shortest held out": 12, "SFT conversations": 18, "of a held-out scene": 1,
        "environment or next speaker": 2, "without an assistant turn": 1, "held-out prompts": 3,
    }  # fmt: skip
    assert len(read_prompts([tmp_path / "out" / "heldout_prompts.jsonl"], flag="--domain-prompts").prompts) == 3
    assert len(ConversationSet([tmp_path / "out" / "sft.jsonl"], flag="--conversations")) == 18


def test_every_conversation_on_demand(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "out", "--keep-all-conversations") == 0
    assert read(tmp_path / "out" / "heldout_prompts.jsonl")[-1]["id"].endswith(":23")  # the world model's, of 16 turns


def test_the_same_bytes_twice(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "a") == prepare(source, tmp_path / "b") == 0
    for name in ("heldout_prompts.jsonl", "sft.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_planted_violation_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Were the scenes not compared, the other part of scene 11 would be in the SFT set: the closing check sees it."""
    monkeypatch.setattr(coser, "utterances", lambda texts: set())
    assert prepare(source, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "SFT row sft_conversations_sharegpt.json:22 holds held-out text" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["a turn", "the held-out answer", "with a speaker", "within a turn"])
def test_the_check_alone(where: str) -> None:
    prompts = [{"id": "p", "messages": [{"role": "user", "content": line(1, 0)}]}]
    text = {"a turn": line(1, 0), "the held-out answer": line(1, 1), "with a speaker": "Olga: " + line(1, 0).upper(),
            "within a turn": "Well.\n" + line(1, 1) + "\nYes."}[where]  # fmt: skip
    clean = [{"id": "a", "messages": [{"role": "user", "content": line(2, 0)}]}]
    coser._check_held_out(prompts, [line(1, 1)], clean)
    with pytest.raises(ConfigurationError, match="SFT row b holds held-out text"):
        coser._check_held_out(
            prompts, [line(1, 1)], [*clean, {"id": "b", "messages": [{"role": "assistant", "content": text}]}]
        )


def test_the_hub_gives_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, file: str, revision: str | None) -> tuple[str, str]:
        if revision == "broken":
            raise ConnectionError("the connection was lost")
        assert (name, file) == ("Neph0s/CoSER", "train/sft_conversations_sharegpt.json")
        return str(source), "c0ffee"

    monkeypatch.setattr(coser, "download", download)
    flags = ["coser", "--held-out", "3", "--output"]
    assert main([*flags, str(tmp_path / "hub")]) == prepare(source, tmp_path / "file") == 0
    assert read(tmp_path / "hub" / "sft.jsonl") == read(tmp_path / "file" / "sft.jsonl")
    manifest = json.loads((tmp_path / "hub" / "manifest.json").read_text())
    assert manifest["made_from"]["source"]["revision"] == "c0ffee"
    assert main([*flags, str(tmp_path / "none"), "--revision", "broken"]) == 2
    assert "cannot be downloaded (ConnectionError: the connection was lost)" in capsys.readouterr().err
    assert prepare(source, tmp_path / "none", "--revision", "x") == 2
    assert "--revision x: " in capsys.readouterr().err


def test_long_rows_are_passed_over(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "out", "--max-characters", 700) == 0
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["too long"] > 0
    for name in ("heldout_prompts.jsonl", "sft.jsonl"):
        for row in read(tmp_path / "out" / name):
            assert sum(len(message["content"]) for message in row["messages"]) <= 700


@pytest.mark.parametrize(
    ("content", "flags", "text"),
    [
        (json.dumps([{"dialogue": []}]), [], "lacks the column(s) conversations"),
        (json.dumps([{"conversations": [{"role": "user", "content": "x"}]}]), [], "expected the sharegpt layout"),
        (json.dumps([{"conversations": "text"}]), [], "expected the sharegpt layout"),
        (json.dumps(rows()[:3]), [], "--held-out 3: "),
        (json.dumps(rows()), ["--held-out", "0"], "--held-out 0: must be at least 1"),
        (json.dumps(rows())[:-40], [], "the file is damaged or cut off"),
        ("[]", [], "has no rows"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, flags: list[str], text: str
) -> None:
    source = tmp_path / "a.json"
    source.write_text(content)
    assert prepare(source, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("prepare_prompts.py: error: --") and text in error
    assert not (tmp_path / "out" / "sft.jsonl").exists() and not (tmp_path / "out" / "manifest.json").exists()
