"""The schedule of branches, and what a batch keeps true about its tensors."""

import dataclasses
from collections import Counter

import pytest
import torch

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.schedule import AlternatingSchedule, Branch, BranchSchedule, MixedSchedule, ScoreRule


def letters(schedule: BranchSchedule, steps: int) -> str:
    return "".join("G" if schedule.branch(step) is Branch.GENERAL else "D" for step in range(steps))


@pytest.mark.parametrize(
    ("recovery", "preservation", "expected"),
    [(3, 1, "GGGDGGGDGG"), (1, 1, "GDGDGDGDGD"), (5, 1, "GGGGGDGGGG"), (2, 3, "GGDDDGGDDD"), (0, 1, "DDDDDDDDDD")],
)
def test_branches_alternate(recovery: int, preservation: int, expected: str) -> None:
    assert letters(BranchSchedule(recovery, preservation), 10) == expected


def test_defaults_are_three_to_one_and_a_branch_may_be_left_out() -> None:
    assert letters(BranchSchedule(), 8) == "GGGDGGGD"
    assert letters(BranchSchedule(recovery_steps=2, preservation_steps=0), 5) == "GGGGG"


def test_branch_values_are_the_names_of_the_streams() -> None:
    assert [branch.value for branch in Branch] == ["general", "domain"]


@pytest.mark.parametrize(
    ("recovery", "preservation", "flag"),
    [(-1, 1, "--recovery-steps is -1"), (3, -2, "--preservation-steps is -2"), (0, 0, "at least one must be positive")],
)
def test_impossible_settings_are_refused(recovery: int, preservation: int, flag: str) -> None:
    with pytest.raises(ConfigurationError, match=flag):
        BranchSchedule(recovery, preservation)


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        BranchSchedule().branch(-1)


@pytest.mark.parametrize("steps", [(3, 1), (1, 0, 2), (2, 3, 4), (5,)])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 18, 100])
def test_a_tally_is_the_count_of_its_steps(steps: tuple[int, ...], count: int) -> None:
    for schedule in (AlternatingSchedule(steps), MixedSchedule(steps)):
        batch_size = 4 * sum(steps)
        expected = Counter(schedule.counts(step, batch_size) for step in range(count))
        assert {key: number for key, number in schedule.tally(count, batch_size).items() if number} == expected


def test_a_long_turn_takes_no_memory() -> None:
    schedule = AlternatingSchedule([2 * 10**9, 1])
    assert [schedule.branch_index(step) for step in (0, 2 * 10**9 - 1, 2 * 10**9)] == [0, 0, 1]
    assert schedule.tally(10**12, 4) == {(4, 0): 999_999_999_501, (0, 4): 499}


def test_any_number_of_branches_takes_turns() -> None:
    steps = [3, 0, 1, 2]
    schedule, order = AlternatingSchedule(steps), [0, 0, 0, 2, 3, 3]
    for step in range(40):
        assert schedule.branch_index(step) == order[step % 6]
        expected = [8 if branch == order[step % 6] else 0 for branch in range(4)]
        assert schedule.counts(step, 8) == tuple(expected)
    with pytest.raises(ValueError, match="step is -1"):
        schedule.counts(-1, 8)


def test_mixtures_divide_a_batch() -> None:
    schedule = MixedSchedule([3, 0, 1, 2])
    assert [schedule.counts(step, 12) for step in (0, 7)] == [(6, 0, 2, 4)] * 2
    assert [size for size in range(1, 19) if schedule.divides(size)] == [6, 12, 18]
    assert MixedSchedule([1, 0]).counts(0, 5) == (5, 0)


def test_the_two_branch_schedule_is_an_alternating_one() -> None:
    assert [BranchSchedule(2, 1).counts(step, 4) for step in range(4)] == [(4, 0), (4, 0), (0, 4), (4, 0)]
    assert {branch: branch.score for branch in Branch} == {
        Branch.GENERAL: ScoreRule.ABSOLUTE,
        Branch.DOMAIN: ScoreRule.POSITIVE,
    }


def rollout(indices: list[int], prompts: list[int], responses: list[int]) -> RolloutBatch:
    """Token ids and log-probabilities tell sample and place: 100 * index + column, and -(index + column / 100)."""
    places, lengths = torch.tensor(prompts), torch.tensor(responses)
    total = int((places + lengths).max())
    tokens, logprobs = (
        torch.zeros(len(indices), total, dtype=torch.int64),
        torch.zeros(len(indices), int(lengths.max())),
    )
    for row, index in enumerate(indices):
        end = prompts[row] + responses[row]
        tokens[row, :end] = 100 * index + torch.arange(end)
        logprobs[row, : responses[row]] = -(index + torch.arange(responses[row]) / 100)
    truncated = torch.tensor([index % 2 == 1 for index in indices])
    return RolloutBatch(torch.tensor(indices), tokens, places, lengths, logprobs, truncated)


def test_response_mask_follows_the_lengths() -> None:
    mask = rollout([0, 1, 2], prompts=[2, 1, 4], responses=[3, 0, 1]).response_mask
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, True], [False, False, False], [True, False, False]]


def test_take_by_rows_and_by_mask() -> None:
    batch = rollout([4, 5, 6], prompts=[2, 1, 3], responses=[1, 3, 2])
    chosen = batch.take(torch.tensor([2, 0]))
    assert chosen.indices.tolist() == [6, 4]
    assert chosen.tokens.tolist() == [[600, 601, 602, 603, 604], [400, 401, 402, 0, 0]]
    assert batch.take(torch.tensor([False, True, False])).truncated.tolist() == [True]
    assert len(batch.take(torch.tensor([], dtype=torch.int64))) == 0


def test_concatenate_pads_to_the_widest_and_sorts() -> None:
    parts = [rollout([3, 1], [1, 2], [1, 1]), rollout([2, 0], [3, 1], [2, 3])]
    for order in (parts, parts[::-1]):
        batch = RolloutBatch.concatenate(order)
        assert batch.indices.tolist() == [0, 1, 2, 3]
        assert batch.tokens.shape == (4, 5) and batch.rollout_logprobs.shape == (4, 3)
        assert batch.tokens[1].tolist() == [100, 101, 102, 0, 0]
        assert batch.response_lengths.tolist() == [3, 1, 2, 1]
        assert batch.truncated.tolist() == [False, True, False, True]
        torch.testing.assert_close(batch.rollout_logprobs[2], torch.tensor([-2.0, -2.01, 0.0]))


def test_scored_rows_stay_with_their_rollout() -> None:
    parts = [rollout([1], [1], [1]), rollout([2, 0], [3, 1], [2, 3])]
    scored = [
        ScoredBatch(
            part,
            part.indices * 10,
            part.rollout_logprobs * 2,
            part.rollout_logprobs * 3,
            prompt_ids=tuple(f"row {index}" for index in part.indices.tolist()),
            categories=tuple("odd" if index % 2 else None for index in part.indices.tolist()),
        )
        for part in parts
    ]
    batch = ScoredBatch.concatenate(scored)
    assert len(batch) == 3 and batch.response_mask.sum(dim=1).tolist() == [3, 1, 2]
    torch.testing.assert_close(batch.teacher_logprobs, batch.rollout.rollout_logprobs * 2)
    torch.testing.assert_close(batch.student_logprobs, batch.rollout.rollout_logprobs * 3)
    last = batch.take(torch.tensor([2]))
    assert last.rollout.indices.tolist() == [2]
    torch.testing.assert_close(last.student_logprobs, last.rollout.rollout_logprobs * 3)
    assert batch.branches.tolist() == [0, 10, 20] and last.branches.tolist() == [20]
    assert batch.prompt_ids == ("row 0", "row 1", "row 2") and last.prompt_ids == ("row 2",)
    assert batch.categories == (None, "odd", None)
    assert batch.take(torch.tensor([False, True, False])).categories == ("odd",)
    rows = dataclasses.replace(batch, branches=torch.tensor([1, 0, 1])).rows_by_branch()
    assert {branch: found.tolist() for branch, found in rows.items()} == {0: [1], 1: [0, 2]}


def test_broken_batches_are_caught() -> None:
    good = rollout([0, 1], [1, 1], [2, 1])
    with pytest.raises(AssertionError, match="too narrow"):
        RolloutBatch(
            good.indices,
            good.tokens,
            good.prompt_lengths,
            good.response_lengths + 1,
            good.rollout_logprobs,
            good.truncated,
        )
    with pytest.raises(AssertionError, match="came twice"):
        RolloutBatch.concatenate([good, good])
    with pytest.raises(AssertionError, match="teacher_logprobs"):
        ScoredBatch(good, torch.tensor([0, 0]), good.rollout_logprobs[:, :1], good.rollout_logprobs)
    with pytest.raises(AssertionError):
        ScoredBatch(good, torch.tensor([0]), good.rollout_logprobs, good.rollout_logprobs)
