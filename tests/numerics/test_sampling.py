"""Sampling: the noise is uniform along every axis it is counted on, and what is drawn follows softmax(z / T).

The noise is a hash, so each statistic below is one fixed number: these tests cannot fail by bad luck, only by a change.
"""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.counter_random import mix
from megatron_camopd.rollout import sampling
from megatron_camopd.rollout.sampling import gumbel_noise, sample_tokens

HIDDEN, VOCABULARY = 6, 16
MOST_DEVIATIONS = 5.0  # of chi-square from its mean, in standard deviations


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One process is the whole tensor-parallel group."""
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def chi_square_deviations(counts: Tensor, expected: Tensor) -> float:
    """(chi2 - k) / sqrt(2 k) with k = cells - 1 degrees of freedom."""
    freedom = counts.numel() - 1
    chi2 = float(((counts.double() - expected) ** 2 / expected).sum())
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def uniform_deviations(values: Tensor, cells: int) -> float:
    counts = torch.bincount((values * cells).long().flatten(), minlength=cells)
    return chi_square_deviations(counts, torch.full((cells,), values.numel() / cells, dtype=torch.float64))


def uniforms(axis: str, count: int) -> Tensor:
    """[count] numbers in (0, 1) behind the noise when one of its five coordinates counts up and the others stay."""
    here = {name: torch.tensor([3]) for name in ("indices", "response_positions", "token_ids")}
    counting = torch.arange(count)
    if axis in ("seed", "step"):
        fixed = {"seed": 1234, "step": 5}
        rows = [gumbel_noise(**(fixed | {axis: int(value)}), **here) for value in counting]
        noise = torch.cat(rows)
    else:
        noise = gumbel_noise(1234, 5, **(here | {axis: counting, **_same_rows(axis, count)}))
    return noise.flatten().neg().exp().neg().exp()


def _same_rows(axis: str, count: int) -> dict[str, Tensor]:
    """Indices and positions come in pairs."""
    other = {"indices": "response_positions", "response_positions": "indices"}.get(axis)
    return {} if other is None else {other: torch.full((count,), 3)}


def test_mix_is_splitmix64() -> None:
    """The published sequence from state 1234567: each output is the mix of a state that grew by the golden gamma."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + step * 0x9E3779B97F4A7C15) % 2**64 for step in range(len(outputs))]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    assert [value % 2**64 for value in mix(signed).tolist()] == outputs


@pytest.mark.parametrize(
    ("axis", "count"),
    [("token_ids", 200_000), ("indices", 200_000), ("response_positions", 200_000), ("seed", 4000), ("step", 4000)],
)
def test_noise_is_uniform_along_every_axis(axis: str, count: int) -> None:
    values = uniforms(axis, count)
    assert values.dtype == torch.float64 and values.min() > 0 and values.max() < 1
    assert len(values.unique()) == count
    assert abs(uniform_deviations(values, 64)) < MOST_DEVIATIONS
    # Neighbours must not know of each other: pairs of them fill a square evenly.
    cells = 16 if count > 10_000 else 8
    pairs = (values[:-1] * cells).long() * cells + (values[1:] * cells).long()
    expected = torch.full((cells * cells,), len(pairs) / cells**2, dtype=torch.float64)
    assert abs(chi_square_deviations(torch.bincount(pairs, minlength=cells**2), expected)) < MOST_DEVIATIONS


def test_noise_is_finite_and_has_the_moments_of_gumbel() -> None:
    noise = gumbel_noise(0, 0, torch.arange(500), torch.zeros(500, dtype=torch.int64), torch.arange(1000))
    assert noise.shape == (500, 1000) and noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * math.pi / math.sqrt(6 * noise.numel()))
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.01)


def test_coordinates_are_not_interchangeable() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    noises = [
        gumbel_noise(seed, step, index, position, token)
        for seed, step, index, position, token in (
            (1, 2, one, one, one), (2, 1, one, one, one), (1, 1, two, one, one),
            (1, 1, one, two, one), (1, 1, one, one, two), (1, 1, one, one, one),
        )
    ]  # fmt: skip
    assert len({float(noise) for noise in noises}) == len(noises)


def test_noise_depends_on_nothing_else() -> None:
    """Neither the other rows nor which columns a rank holds: ranks and batches cut one and the same table."""
    rows, tokens = torch.arange(20), torch.arange(48)
    whole = gumbel_noise(7, 3, rows, rows % 5, tokens)
    for start in range(0, 48, 12):
        shard = gumbel_noise(7, 3, rows, rows % 5, tokens[start : start + 12])
        assert torch.equal(shard, whole[:, start : start + 12])
    some = torch.tensor([11, 2, 17])
    assert torch.equal(gumbel_noise(7, 3, rows[some], (rows % 5)[some], tokens), whole[some])


def model(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A hidden state [H] and an output weight [V, H] with logits of about a nat."""
    generator = torch.Generator().manual_seed(seed)
    return exact(torch.randn(HIDDEN, generator=generator)), exact(
        0.4 * torch.randn(VOCABULARY, HIDDEN, generator=generator)
    )


def exact(values: Tensor) -> Tensor:
    """Multiples of 1/16: their products and sums are free of rounding, so that equal rows give equal logits."""
    return (16 * values).round() / 16


def draw(
    hidden: Tensor, weight: Tensor, group: Any, *, temperature: float, valid: int = VOCABULARY, seed: int = 1,
    step: int = 0, indices: Tensor | None = None, positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    indices = torch.arange(len(hidden)) if indices is None else indices
    return sample_tokens(
        hidden,
        weight,
        seed=seed,
        step=step,
        indices=indices,
        response_positions=torch.zeros_like(indices) if positions is None else positions,
        temperature=temperature,
        valid_vocab_size=valid,
        tp_group=group,
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("axis", ["indices", "positions"])
def test_frequencies_follow_softmax(temperature: float, axis: str, group: Any) -> None:
    count, valid = 60_000, 13
    hidden, weight = model()
    fixed, counting = torch.full((count,), 4), torch.arange(count)
    rows = {"indices": fixed, "positions": fixed} | {axis: counting}
    tokens, logprobs = draw(
        hidden.expand(count, -1), weight, group, temperature=temperature, valid=valid,
        indices=rows["indices"], positions=rows["positions"],
    )  # fmt: skip
    expected = ((weight.double() @ hidden.double())[:valid] / temperature).log_softmax(-1)
    frequent = expected.exp() * count
    assert frequent.min() > 5, "too rare for chi-square"
    counts = torch.bincount(tokens, minlength=VOCABULARY)
    assert not counts[valid:].any()
    assert abs(chi_square_deviations(counts[:valid], frequent)) < MOST_DEVIATIONS
    # and it would notice the wrong temperature
    other = ((weight.double() @ hidden.double())[:valid] / (1.1 * temperature)).softmax(-1) * count
    assert chi_square_deviations(counts[:valid], other) > 3 * MOST_DEVIATIONS
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected[tokens], rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_phantom_ids_are_never_drawn(temperature: float, group: Any) -> None:
    """However large their logits; and they have no share in the probabilities."""
    hidden, weight = model()
    weight[10:] = 100 * hidden
    tokens, logprobs = draw(hidden.expand(2000, -1), weight, group, temperature=temperature, valid=10)
    assert int(tokens.max()) < 10
    expected = ((weight[:10].double() @ hidden.double()) / (temperature or 1.0)).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected[tokens], rtol=0, atol=2e-6)


def test_greedy_takes_the_largest_and_the_lowest_of_equals(group: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight = exact(torch.randn(50, HIDDEN, generator=generator)), model()[1]
    weight[3] = weight[9] = 2 * weight[4]
    tokens, logprobs = draw(hidden, weight, group, temperature=0.0)
    logits = hidden.double() @ weight.double().t()
    best = [max(range(VOCABULARY), key=lambda token: (float(row[token]), -token)) for row in logits]
    assert tokens.tolist() == best and 3 in best and 9 not in best
    expected = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-6)


def test_a_sample_does_not_depend_on_its_batch(group: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(64, HIDDEN, generator=generator), model()[1]
    indices, positions = torch.arange(64) * 3, torch.arange(64) % 7
    tokens, logprobs = draw(hidden, weight, group, temperature=1.0, indices=indices, positions=positions)
    rows = torch.randperm(64, generator=generator)[:20]
    for some in (rows, rows[:1]):
        alone = draw(hidden[some], weight, group, temperature=1.0, indices=indices[some], positions=positions[some])
        assert torch.equal(alone[0], tokens[some])
        torch.testing.assert_close(alone[1], logprobs[some], rtol=0, atol=1e-6)
    for changes in ({"seed": 2}, {"step": 1}):
        other = draw(hidden, weight, group, temperature=1.0, indices=indices, positions=positions, **changes)[0]
        assert (other != tokens).any()


class PlayedRanks:
    """The three functions of ``torch.distributed`` that sampling uses, with one thread a rank."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.slots: list[Tensor] = [torch.empty(0)] * ranks
        self.meet = threading.Barrier(ranks, timeout=30)

    def get_rank(self, group: int) -> int:
        return group

    def get_world_size(self, group: int) -> int:
        return self.ranks

    def all_gather(self, tensors: list[Tensor], tensor: Tensor, group: int) -> None:
        self.slots[group] = tensor
        self.meet.wait()
        for target, source in zip(tensors, self.slots, strict=True):
            target.copy_(source)
        self.meet.wait()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("valid", [VOCABULARY, 7])  # with 7 some ranks hold phantom ids only
def test_ranks_draw_what_one_rank_draws(
    ranks: int, temperature: float, valid: int, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(7)
    hidden, weight = exact(torch.randn(300, HIDDEN, generator=generator)), model()[1]
    weight[5] = weight[2]  # equal logits on two ranks
    tokens, logprobs = draw(hidden, weight, group, temperature=temperature, valid=valid)
    monkeypatch.setattr(sampling, "dist", PlayedRanks(ranks))
    with ThreadPoolExecutor(ranks) as pool:
        tasks = [
            pool.submit(draw, hidden, shard, rank, temperature=temperature, valid=valid)
            for rank, shard in enumerate(weight.chunk(ranks))
        ]
        answers = [task.result() for task in tasks]
    for found, found_logprobs in answers:
        assert torch.equal(found, tokens) and found.dtype == torch.int64
        torch.testing.assert_close(found_logprobs, logprobs, rtol=0, atol=2e-6)
        assert torch.equal(found_logprobs, answers[0][1])  # bit for bit on every rank
