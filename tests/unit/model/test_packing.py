"""Filling micro-batches by tokens, and sharing sequences out among ranks: complete, within the limits, even."""

import math
import random

import pytest

from megatron_camopd.model.packing import PackingRule, SequenceCost, balanced, imbalance


def lengths(count: int, seed: int, *, median: float = 90, sigma: float = 0.9, most: int = 512) -> list[int]:
    """Lognormal lengths, as those of responses."""
    draw = random.Random(seed).gauss
    return [min(most, max(1, round(math.exp(math.log(median) + sigma * draw(0, 1))))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multiple", [1, 8])
def test_bins(seed: int, multiple: int) -> None:
    rule = PackingRule(max_tokens=1024, sequence_multiple=multiple, total_multiple=multiple)
    found = lengths(200, seed)
    bins = rule.bins(found)
    assert sorted(place for places in bins for place in places) == list(range(200))
    totals = [sum(rule.padded(found[place]) for place in places) for places in bins]
    assert max(totals) <= 1024 and all(
        rule.padded(n) % multiple == 0 and 0 <= rule.padded(n) - n < multiple for n in found
    )
    assert len(bins) <= math.ceil(11 / 9 * sum(totals) / 1024) + 1  # what best-fit decreasing guarantees
    assert rule.bins([]) == []
    assert rule.bins([8, 2000, 16]) == [[1], [2, 0]]
    assert rule.bins([1024, 8, 1024, 8, 512, 504]) == [[0], [2], [4, 5, 1], [3]]


def test_many_sequences_take_no_time() -> None:
    """Trying every micro-batch for every sequence would take some 10^9 steps."""
    rule = PackingRule(max_tokens=600)
    assert len(rule.bins(lengths(100_000, 5, median=500, sigma=0.1, most=600))) > 90_000


def test_what_ranks_do_besides_counts() -> None:
    """Rows of several teachers, few for each: without the loads from before, the first ranks would get all of them."""
    loads = [0] * 4
    given = [balanced(costs, 4, loads) for costs in ([9, 8], [7], [5], [6, 2])]
    assert given == [[[0], [1], [], []], [[], [], [0], []], [[], [], [], [0]], [[], [], [1], [0]]]
    assert loads == [9, 8, 9, 11]
    for seed in range(5):
        loads, parts = [0] * 16, [lengths(count, seed, median=6000, sigma=1.0, most=36_864) for count in (13, 3, 7, 20)]
        alone = [0] * 16
        for part in parts:
            balanced(part, 16, loads)
            for rank, share in enumerate(balanced(part, 16)):
                alone[rank] += sum(part[place] for place in share)
        assert max(loads) < 0.9 * max(alone) and sum(loads) == sum(alone)


def test_balance_of_few_and_of_equal_items() -> None:
    assert balanced([], 3) == [[], [], []] and imbalance([[], [], []], []) == 1.0
    assert balanced([5], 2) == [[0], []] and imbalance([[0], []], [5]) == 2.0
    assert balanced([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert balanced([1, 9, 1, 7, 1], 2) == [[1, 4], [0, 2, 3]]


def test_cost() -> None:
    """Per layer and token: the matrices once, and the products of attention with half of the sequence, twice."""
    from argparse import Namespace

    args = Namespace(
        num_attention_heads=4, num_query_groups=2, kv_channels=8, hidden_size=16, ffn_hidden_size=24, num_experts=None
    )
    cost = SequenceCost.of(args)
    matrices = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 24  # queries; keys and values; output; gate, up, down
    for length in (1, 2, 100):
        assert cost(length) == length * matrices + 2 * (length * length * 4 * 8) // 2
    vars(args).update(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=12)
    assert SequenceCost.of(args) == cost
