"""The log of samples: which steps and rows it takes, what it says of them, and what a resumed run keeps of it."""

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.schedule import BranchSpec, ScoreRule
from megatron_camopd.stages.distill.samples import SampleLog, SampleSettings
from tests.support.worlds import World, prepare, refusal

BRANCHES = (BranchSpec(name="general"), BranchSpec(name="medical", score=ScoreRule.POSITIVE))
TURNS = [[0], [0], [0], [1]]  # branches that steps serve, in turn


def serves(step: int) -> Collection[int]:
    return TURNS[step % len(TURNS)]


def scored(tokenizer: PreTrainedTokenizerFast, branches: list[int], responses: list[str]) -> ScoredBatch:
    """Samples whose gap at response token t is (-1)^t (t + 1) / 10 nats."""
    prompts = [tokenizer.encode(f"<|im_start|>q{row}", add_special_tokens=False) for row in range(len(responses))]
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in responses]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    lengths = torch.tensor([len(answer) for answer in answers])
    places = torch.arange(int(lengths.max()))
    gap = torch.where(places % 2 == 0, 1.0, -1.0) * (places + 1) / 10
    student = torch.full((len(prompts), len(places)), -2.0)
    rollout = RolloutBatch(
        indices=torch.arange(len(prompts)),
        tokens=tokens,
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_lengths=lengths,
        rollout_logprobs=student,
        truncated=torch.tensor([row == 1 for row in range(len(prompts))]),
    )
    return ScoredBatch(
        rollout,
        torch.tensor(branches),
        student + gap,
        student,
        prompt_ids=tuple(f"row-{row}" for row in range(len(prompts))),
        categories=tuple("math" if row % 2 else None for row in range(len(prompts))),
    )


def make_log(
    tokenizer: PreTrainedTokenizerFast, folder: Path | None, *, count: int = 2, interval: int = 8, first_step: int = 0
) -> SampleLog:
    settings = SampleSettings(log_samples=count, log_samples_interval=interval)
    directory = None if folder is None else str(folder)
    return SampleLog(settings, tokenizer, BRANCHES, serves, directory=directory, first_step=first_step)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


Tokenizers = Callable[..., PreTrainedTokenizerFast]


def test_what_a_line_says(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    batch = scored(tokenizer, [0, 0, 0], ["ab<|im_end|>", "<script>", "é!"])
    make_log(tokenizer, tmp_path, count=3).write(0, batch, torch.tensor([True, False, True]))
    first, second, third = lines(tmp_path)
    assert first["prompt"] == "<|im_start|>q0" and first["response"] == "ab<|im_end|>"
    assert (first["id"], first["category"], first["branch"]) == ("row-0", None, "general")
    assert (first["prompt_length"], first["response_length"]) == (3, 3)
    assert first["selected"] and not first["truncated"] and second["truncated"] and not second["selected"]
    assert first["score"] == pytest.approx(0.2) == first["gap_abs_mean"] and first["gap_mean"] == pytest.approx(0.2 / 3)
    spans = [(gap["position"], first["response"][gap["start"] : gap["end"]]) for gap in first["largest_gaps"]]
    assert spans == [(0, "a"), (1, "b"), (2, "<|im_end|>")]
    assert [gap["gap"] for gap in first["largest_gaps"]] == pytest.approx([0.1, -0.2, 0.3])
    assert second["response"] == "<script>" and second["category"] == "math"
    # "é" are two tokens: the character counts as the second one's, once it is complete.
    spans = [third["response"][gap["start"] : gap["end"]] for gap in third["largest_gaps"]]
    assert spans == ["", "é", "!"]


def test_the_score_is_the_branchs_own(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    make_log(tokenizer, tmp_path).write(3, scored(tokenizer, [1], ["abc"]), torch.tensor([True]))
    (line,) = lines(tmp_path)
    assert line["branch"] == "medical" and line["score"] == pytest.approx(0.4 / 3)


def test_the_largest_gaps_alone(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = "x" * 100
    make_log(tokenizer, tmp_path).write(0, scored(tokenizer, [0], [text]), torch.tensor([True]))
    found = lines(tmp_path)[0]["largest_gaps"]
    assert [gap["position"] for gap in found] == list(range(68, 100))
    assert [(gap["start"], gap["end"]) for gap in found] == [(place, place + 1) for place in range(68, 100)]


def test_every_branch_is_shown_whatever_the_interval(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    log = make_log(tokenizer, tmp_path, interval=8)
    for step in range(20):
        (branch,) = serves(step)
        log.write(step, scored(tokenizer, [branch] * 4, ["a"] * 4), torch.ones(4, dtype=torch.bool))
    steps = [(line["step"], line["branch"], line["id"]) for line in lines(tmp_path)]
    assert steps == [
        (step, branch, row)
        for step, branch in ((0, "general"), (3, "medical"), (8, "general"), (11, "medical"), (16, "general"),
                             (19, "medical"))
        for row in ("row-0", "row-2")
    ]  # fmt: skip


def test_a_mixed_step_shows_all_branches(tiny_tokenizer: Tokenizers, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(f"{__name__}.TURNS", [[0, 1]])
    tokenizer = tiny_tokenizer()
    log = make_log(tokenizer, tmp_path, count=4, interval=2)
    for step in range(4):
        log.write(step, scored(tokenizer, [0] * 4 + [1] * 4, ["a"] * 8), torch.ones(8, dtype=torch.bool))
    assert [line["step"] for line in lines(tmp_path)] == [0] * 8 + [2] * 8
    assert [line["branch"] for line in lines(tmp_path)[:8]] == ["general"] * 4 + ["medical"] * 4


def test_each_branch_gets_its_number_in_a_mixed_step(
    tiny_tokenizer: Tokenizers, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(f"{__name__}.TURNS", [[0, 1]])
    tokenizer = tiny_tokenizer()
    batch = scored(tokenizer, [0] * 7 + [1], ["a"] * 8)
    make_log(tokenizer, tmp_path, count=1).write(0, batch, torch.ones(8, dtype=torch.bool))
    assert [(line["branch"], line["id"]) for line in lines(tmp_path)] == [("general", "row-0"), ("medical", "row-7")]


def test_line_separators_in_a_text_survive_a_resume(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    texts = [json.dumps({"step": step, "text": "a\u2028b\u2029c\x85d"}, ensure_ascii=False) for step in range(3)]
    (tmp_path / "samples.jsonl").write_text("\n".join([*texts, '{"step": 1, "te']), encoding="utf-8")
    make_log(tiny_tokenizer(), tmp_path, count=0, first_step=2)
    found = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert found == texts[0] + "\n" + texts[1] + "\n", "later steps are dropped also where no samples are logged"


def test_damaged_lines_are_counted(tiny_tokenizer: Tokenizers, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\nnot json\n{"step": 1}\n[]\n')
    make_log(tiny_tokenizer(), tmp_path, first_step=2)
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    assert "2 lines are no records of a step; dropped" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_costs_its_samples_alone(
    tiny_tokenizer: Tokenizers, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    tokenizer = tiny_tokenizer()
    make_log(tokenizer, tmp_path).write(0, scored(tokenizer, [0, 0], ["a", "b"]), torch.tensor([True, True]))
    assert "2 samples of step 0 were not written (Is a directory)" in capsys.readouterr().out


def test_what_an_editor_left_of_the_file(tiny_tokenizer: Tokenizers, tmp_path: Path, capsys: Any) -> None:
    """A complete last line without its end stays; blank lines are no damage; a link stays a link."""
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"step": 0}\n\n{"step": NaN}\n{"step": 1}')
    (tmp_path / "samples.jsonl").symlink_to(kept)
    make_log(tiny_tokenizer(), tmp_path, first_step=5)
    assert kept.read_text() == '{"step": 0}\n{"step": 1}\n' and (tmp_path / "samples.jsonl").is_symlink()
    assert "1 lines are no records" in capsys.readouterr().out


def test_half_a_line_does_not_stay(tiny_tokenizer: Tokenizers, tmp_path: Path, monkeypatch: Any) -> None:
    """A disk that is full in the middle of a line costs that step's samples and no others."""
    import resource
    import signal

    tokenizer = tiny_tokenizer()
    log = make_log(tokenizer, tmp_path, interval=1)
    log.write(0, scored(tokenizer, [0], ["a"]), torch.tensor([True]))
    before, limits = (tmp_path / "samples.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        log.write(8, scored(tokenizer, [0], ["b"]), torch.tensor([True]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_intervals_are_the_same_after_a_resume(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for name, parts in (("whole", [range(16)]), ("parts", [range(3), range(3, 11), range(11, 16)])):
        for part in parts:
            log = make_log(tokenizer, tmp_path / name, count=1, interval=5, first_step=part[0])
            for step in part:
                branches = list(serves(step))
                log.write(
                    step, scored(tokenizer, branches, ["a"] * len(branches)), torch.tensor([True] * len(branches))
                )
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts") != []


def test_numbers_that_are_not_finite(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    batch = scored(tokenizer, [0], ["abc"])
    batch.teacher_logprobs[0, 1] = math.nan
    make_log(tokenizer, tmp_path).write(0, batch, torch.tensor([True]))
    (line,) = lines(tmp_path)
    assert line["gap_mean"] is None and line["score"] is None
    assert [gap["gap"] for gap in line["largest_gaps"]] == [pytest.approx(0.1), None, pytest.approx(0.3)]


def test_a_resumed_run_drops_what_its_checkpoint_does_not_hold(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    log = make_log(tokenizer, tmp_path, interval=4)
    for step in (0, 4, 8):
        log.write(step, scored(tokenizer, [0] * 2, ["a"] * 2), torch.ones(2, dtype=torch.bool))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 12, "cut sho')
    make_log(tokenizer, tmp_path, first_step=8)
    assert [line["step"] for line in lines(tmp_path)] == [0, 0, 4, 4]


def test_nothing_is_written_where_nothing_was_asked_for(tiny_tokenizer: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    batch, selected = scored(tokenizer, [0], ["a"]), torch.tensor([True])
    make_log(tokenizer, None).write(0, batch, selected)
    make_log(tokenizer, tmp_path, count=0).write(0, batch, selected)
    assert not list(tmp_path.iterdir())


def test_flags(world: World, tmp_path: Path) -> None:
    args, _ = prepare(world.flags(save=tmp_path / "run", log_samples=8))
    assert SampleSettings.of(args) == SampleSettings(log_samples=8, log_samples_interval=20)
    for changes, line in (
        ({"log_samples": -1}, "--log-samples -1: must be 0 (off) or more"),
        ({"log_samples": 2, "log_samples_interval": 0}, "--log-samples-interval 0: must be at least 1"),
        ({"log_samples_interval": 5}, "--log-samples-interval: has no effect without --log-samples; give both"),
    ):
        assert refusal(world.flags(save=tmp_path / "run", **changes)) == line
