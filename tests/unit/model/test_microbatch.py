"""Cutting a batch: positions and targets are where plain loops say, a selected sample is trained exactly once."""

import math

import pytest
import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.model.microbatch import groups_by_length, make_microbatches, share_of_selection

CPU = torch.device("cpu")


def make_rollout(lengths: list[tuple[int, int]], *, spare: int = 3) -> RolloutBatch:
    """A batch of (prompt, response) lengths; no two tokens are alike, and the padding is not zero."""
    count, width = len(lengths), max(map(sum, lengths)) + spare
    return RolloutBatch(
        indices=torch.arange(count),
        tokens=1 + torch.arange(count * width).reshape(count, width),
        prompt_lengths=torch.tensor([prompt for prompt, _ in lengths]),
        response_lengths=torch.tensor([response for _, response in lengths]),
        rollout_logprobs=torch.zeros(count, max(response for _, response in lengths) + spare),
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def random_rollout(count: int, seed: int) -> RolloutBatch:
    lengths = torch.randint(1, 9, (count, 2), generator=torch.Generator().manual_seed(seed))
    return make_rollout([(int(prompt), int(response)) for prompt, response in lengths])


@pytest.mark.parametrize("multiple", [1, 4])
def test_cut_matches_plain_loops(multiple: int) -> None:
    rollout = make_rollout([(2, 3), (1, 1), (4, 2), (3, 7), (5, 1)], spare=0)
    groups = [torch.tensor([3, 0]), torch.tensor([1]), torch.tensor([2, 4])]
    microbatches = make_microbatches(rollout, groups, length_multiple=multiple, device=CPU)
    assert len(microbatches) == len(groups)
    for group, microbatch in zip(groups, microbatches, strict=True):
        lengths = [int(rollout.prompt_lengths[row] + rollout.response_lengths[row]) for row in group]
        width = max(lengths)
        while width % multiple:
            width += 1
        assert microbatch.tokens.shape == microbatch.position_ids.shape == (len(group), width)
        assert microbatch.padded_tokens == len(group) * width
        expected = []
        for place, row in enumerate(group.tolist()):
            length = lengths[place]
            assert microbatch.tokens[place, :length].tolist() == rollout.tokens[row, :length].tolist()
            assert not microbatch.tokens[place, length:].any()
            assert microbatch.position_ids[place].tolist() == list(range(width))
            prompt = int(rollout.prompt_lengths[row])
            for column in range(int(rollout.response_lengths[row])):
                target = int(rollout.tokens[row, prompt + column])
                expected.append((place * width + prompt + column - 1, target, row, column))
        found = (microbatch.positions, microbatch.targets, microbatch.rows, microbatch.columns)
        assert list(zip(*(values.tolist() for values in found), strict=True)) == expected


def test_positions_see_the_token_before_the_target() -> None:
    rollout = random_rollout(6, seed=0)
    for part in make_microbatches(rollout, groups_by_length(rollout, 2), length_multiple=1, device=CPU):
        before = part.tokens.flatten()[part.positions]
        assert torch.equal(before + 1, part.targets)  # tokens of a row count up by one


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_groups_by_length(size: int) -> None:
    rollout = random_rollout(7, seed=1)
    groups = groups_by_length(rollout, size)
    rows = torch.cat(groups)
    assert sorted(rows.tolist()) == list(range(7))
    assert [len(group) for group in groups] == [size] * (7 // size) + [7 % size] * (7 % size > 0)
    lengths = (rollout.prompt_lengths + rollout.response_lengths)[rows].tolist()
    assert lengths == sorted(lengths, reverse=True)


def shares(rollout: RolloutBatch, selected: Tensor, ranks: int, size: int) -> list[tuple[list[Tensor], int]]:
    return [share_of_selection(rollout, selected, rank=rank, ranks=ranks, size=size) for rank in range(ranks)]


@pytest.mark.parametrize("selected_count", range(8))
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_selection_is_shared_out_once(selected_count: int, ranks: int, size: int) -> None:
    rollout = random_rollout(8, seed=selected_count)
    selected = torch.randperm(8, generator=torch.Generator().manual_seed(ranks))[:selected_count].sort().values
    dealt = shares(rollout, selected, ranks, size)
    assert len({len(groups) for groups, _ in dealt}) == 1, "ranks run different numbers of microbatches"
    fullest = math.ceil(selected_count / ranks)
    assert len(dealt[0][0]) == max(1, math.ceil(fullest / size)), "more microbatches than needed"
    trained = [row for groups, filled in dealt for group in groups[:filled] for row in group.tolist()]
    assert sorted(trained) == selected.tolist()
    shortest = int((rollout.prompt_lengths + rollout.response_lengths).min())
    for groups, filled in dealt:
        assert all(1 <= len(group) <= size for group in groups)
        for filler in groups[filled:]:
            assert len(filler) == 1
            assert int(rollout.prompt_lengths[filler] + rollout.response_lengths[filler]) == shortest
    counts = [sum(len(group) for group in groups[:filled]) for groups, filled in dealt]
    assert max(counts) - min(counts) <= 1


def test_one_selected_of_two_ranks() -> None:
    rollout = make_rollout([(2, 3), (1, 1), (4, 2)])
    (first, filled_first), (second, filled_second) = shares(rollout, torch.tensor([2]), ranks=2, size=1)
    assert ([group.tolist() for group in first], filled_first) == ([[2]], 1)
    assert ([group.tolist() for group in second], filled_second) == ([[1]], 0)


def test_ranks_get_samples_of_about_the_same_lengths() -> None:
    rollout = make_rollout([(1, length) for length in (9, 1, 8, 2, 7, 3)])
    dealt = shares(rollout, torch.arange(6), ranks=2, size=2)
    lengths = [[rollout.response_lengths[group].tolist() for group in groups] for groups, _ in dealt]
    assert lengths == [[[9, 7], [2]], [[8, 3], [1]]]
