"""Draws from the head's rows against inversion in float64, on one process; over shards in tests/distributed."""

import math
from typing import Any

import pytest
import torch

from megatron_camopd.kernels import linear_logprob, sample_ids


def problem(tokens: int, vocab: int, width: int, draws: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + vocab)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    return hidden, weight, torch.rand(tokens, draws, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "vocab", "width", "draws"), [(1, 3, 2, 1), (37, 1301, 16, 5), (20, 129, 4, 3)])
@pytest.mark.parametrize(("temperature", "chunk"), [(0.7, None), (1.0, 6)])
def test_ids_are_those_of_inversion(
    tokens: int, vocab: int, width: int, draws: int, temperature: float, chunk: int | None
) -> None:
    hidden, weight, uniforms = problem(tokens, vocab, width, draws)
    ids, logprob = sample_ids(hidden, weight, uniforms, temperature=temperature, chunk_tokens=chunk)
    table = torch.softmax(hidden.double() @ weight.double().t() / temperature, dim=-1)
    upper = table.cumsum(dim=1)
    for n in range(tokens):
        for d in range(draws):
            picked, u = int(ids[n, d]), float(uniforms[n, d])
            below = float(upper[n, picked] - table[n, picked])
            # fp32 logits move the edges between ids by some 1e-6.
            assert below - 1e-5 <= u < float(upper[n, picked]) + 1e-5
    torch.testing.assert_close(logprob.double(), table.gather(1, ids).log(), rtol=1e-5, atol=1e-5)
    expected, _ = linear_logprob(hidden, weight, ids, temperature=temperature)
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)


def test_frequencies_are_the_probabilities() -> None:
    """20,000 draws of one row: each id's count within 5 standard deviations of a binomial's."""
    draws = 20_000
    hidden, weight, _ = problem(1, 40, 8, 1)
    uniforms = torch.rand(1, draws, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    ids, _ = sample_ids(hidden, weight, uniforms)
    probabilities = torch.softmax(hidden.double() @ weight.double().t(), dim=-1)[0]
    counts = torch.bincount(ids[0], minlength=40)
    for count, p in zip(counts.tolist(), probabilities.tolist(), strict=True):
        assert abs(count - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)) + 1


def test_edges() -> None:
    hidden, weight, _ = problem(6, 24, 5, 1)
    weight[19:] = 1e4  # phantom columns would win every row
    ends = torch.tensor([[0.0, math.nextafter(1.0, 0.0)]], dtype=torch.float64).expand(6, 2)
    ids, _ = sample_ids(hidden, weight, ends, valid_vocab_size=19)
    assert ids[:, 0].eq(0).all()
    assert ids[:, 1].le(18).all() and ids[:, 1].ge(0).all()
    hidden[2] = float("nan")
    hidden[4, 0] = float("inf")
    ids, logprob = sample_ids(hidden, weight, ends, valid_vocab_size=19)
    assert ids[[2, 4]].eq(-1).all() and logprob[[2, 4]].isnan().all()
    assert ids[[0, 1, 3, 5]].ge(0).all() and logprob[[0, 1, 3, 5]].isfinite().all()
    ids, logprob = sample_ids(hidden[:0], weight, ends[:0])
    assert ids.shape == logprob.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"uniforms": torch.zeros(3, 1)}, ValueError, r"not \[N, D\]"),
        ({"uniforms": torch.zeros(6)}, ValueError, r"not \[N, D\]"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"hidden": torch.zeros(6, 5, dtype=torch.float64)}, TypeError, "float64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, uniforms = problem(6, 24, 5, 1)
    with pytest.raises(error, match=message):
        sample_ids(**({"hidden": hidden, "weight": weight, "uniforms": uniforms} | change))
