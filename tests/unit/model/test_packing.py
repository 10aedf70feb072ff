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
@pytest.mark.parametrize("max_sequences", [None, 1, 3])
@pytest.mark.parametrize("multiple", [1, 8])
def test_bins(seed: int, max_sequences: int | None, multiple: int) -> None:
    rule = PackingRule(
        max_tokens=1024, max_sequences=max_sequences, sequence_multiple=multiple, total_multiple=multiple
    )
    found = lengths(200, seed)
    bins = rule.bins(found)
    assert sorted(place for places in bins for place in places) == list(range(200))
    totals = [sum(rule.padded(found[place]) for place in places) for places in bins]
    assert max(totals) <= 1024 and all(
        rule.padded(n) % multiple == 0 and 0 <= rule.padded(n) - n < multiple for n in found
    )
    if max_sequences is None:
        assert len(bins) <= math.ceil(11 / 9 * sum(totals) / 1024) + 1  # what first-fit decreasing guarantees
    else:
        assert max(map(len, bins)) <= max_sequences
        assert max_sequences != 1 or len(bins) == 200
    assert rule.bins([]) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_balance(seed: int, ranks: int) -> None:
    found = lengths(128, seed)
    # By tokens alone; as a layer of 8B parameters; and where attention takes most of the time.
    for cost in (SequenceCost(1, 0), SequenceCost(193_000_000, 4096), SequenceCost(20, 1)):
        costs = [cost(length) for length in found]
        shares = balanced(costs, ranks)
        assert sorted(place for share in shares for place in share) == list(range(128))
        assert all(share == sorted(share) for share in shares)
        loads = [sum(costs[place] for place in share) for share in shares]
        assert max(loads) * ranks <= 1.02 * sum(loads)
        assert cost.attention * 1000 > cost.linear or imbalance(shares, found) <= 1.02
    # In the order of the rows, as before, it would be far off.
    assert ranks < 8 or imbalance([list(range(rank, 128, ranks)) for rank in range(ranks)], found) > 1.1


def test_balance_of_few_and_of_equal_items() -> None:
    assert balanced([], 3) == [[], [], []] and imbalance([[], [], []], []) == 1.0
    assert balanced([5], 2) == [[0], []] and imbalance([[0], []], [5]) == 2.0
    assert balanced([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert balanced([1, 9, 1, 7, 1], 2) == [[1, 4], [0, 2, 3]]


def test_cost() -> None:
    """Per layer and token: the matrices once, and the products of attention with half of the sequence, twice."""
    from argparse import Namespace

    args = Namespace(num_attention_heads=4, num_query_groups=2, kv_channels=8, hidden_size=16, ffn_hidden_size=24)
    cost = SequenceCost.of(args)
    matrices = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 24  # queries; keys and values; output; gate, up, down
    for length in (1, 2, 100):
        assert cost(length) == length * matrices + 2 * (length * length * 4 * 8) // 2
