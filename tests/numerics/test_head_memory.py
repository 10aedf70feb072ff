"""How much memory the head's operations take at once: logits of one chunk of tokens, whatever the batch.

Bytes come from torch's own allocation events. What a matrix library takes besides is in the benchmark's figures
(``tools/benchmark_head.py``), which measure the process.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_camopd.kernels import distill_head, linear_logprob, products, rows_torch, vocab_parallel
from megatron_camopd.kernels.vocab_parallel import CHUNK_BYTES, CHUNK_TOKENS, chunk_size, token_chunks
from tests.support.head_problems import leaves, problem

TOKENS, VOCAB, WIDTH = 1500, 10_007, 8
LOGITS = TOKENS * VOCAB * 4  # bytes of all of them, 60 MB
CHUNK = 8 * 2**20
GROUP = 2**19
ROWS_AT_WORK = 3 * GROUP  # logits, their exponentials, and one of the last turn's
CPU = torch.device("cpu")


def peak_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Return torch's peak of CPU memory beyond the start while ``call`` runs, and the largest block."""
    call()  # what a first call alone allocates
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak, max(event.nbytes() for event in events)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setitem(vocab_parallel.CHUNK_BYTES, "cpu", CHUNK)
    monkeypatch.setitem(rows_torch._GROUP_BYTES, "cpu", GROUP)
    return leaves(problem(TOKENS, VOCAB, WIDTH), torch.float32)


def test_the_measure_sees_whole_logits(inputs: dict[str, Tensor]) -> None:
    """Log-softmax of all logits: two tables of them."""
    with torch.no_grad():
        peak, largest = peak_bytes(lambda: torch.log_softmax(inputs["hidden"] @ inputs["weight"].t(), dim=-1))
    assert largest == LOGITS and 2 * LOGITS <= peak < 2.1 * LOGITS


@pytest.mark.parametrize("backward", [False, True])
def test_distill_head_holds_one_chunk(inputs: dict[str, Tensor], backward: bool) -> None:
    """The chunk, the rows at work, and the gradients: of the weight as sum and product, of hidden likewise."""

    def call() -> None:
        with torch.set_grad_enabled(backward):
            loss, _ = distill_head(**inputs)
            if backward:
                inputs["hidden"].grad = inputs["weight"].grad = None
                loss.backward()

    peak, largest = peak_bytes(call)
    gradients = 2 * (TOKENS + VOCAB) * WIDTH * 4 if backward else 0
    records = TOKENS * 4 * 32
    assert largest <= CHUNK and CHUNK / 2 < peak < CHUNK + ROWS_AT_WORK + gradients + records < LOGITS / 4


def test_linear_logprob_reads_tiles_and_holds_no_row(inputs: dict[str, Tensor]) -> None:
    """Forward only, the CPU holds [chunk, 512] logits, however long their rows are."""
    with torch.no_grad():
        peak, largest = peak_bytes(lambda: linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"]))
    tile = TOKENS * products.CPU_TILE_COLUMNS * 4
    tiles = -(-VOCAB // products.CPU_TILE_COLUMNS)
    records = TOKENS * 4 * (4 * 2 * tiles + 32)  # the tiles' partials, and stacked
    assert largest <= tile and tile <= peak < tile + ROWS_AT_WORK + records < LOGITS / 6


def test_linear_logprob_backward_holds_one_chunk(inputs: dict[str, Tensor]) -> None:
    def call() -> None:
        inputs["hidden"].grad = inputs["weight"].grad = None
        linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"])[0].sum().backward()

    peak, largest = peak_bytes(call)
    gradients = 2 * (TOKENS + VOCAB) * WIDTH * 4
    assert largest <= CHUNK and CHUNK / 2 < peak < CHUNK + ROWS_AT_WORK + gradients + TOKENS * 4 * 32 < LOGITS / 4


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
@pytest.mark.parametrize("count", [1, 64, 65, 1000, 8192, 32_768])
@pytest.mark.parametrize("width", [0, 1, 97, 18_992, 151_936])
def test_chunks_fit_into_their_bytes(device: torch.device, count: int, width: int) -> None:
    size = chunk_size(count, width, device)
    assert 1 <= size <= CHUNK_TOKENS and size * width * 4 <= CHUNK_BYTES[device.type]
    chunks = list(token_chunks(count, size))
    assert [n for chunk in chunks for n in range(chunk.start, chunk.stop)] == list(range(count))
    # As equal as can be, in whole multiples but for the last: products of odd sizes are slower.
    assert size % 64 == 0 and chunks[-1].stop - chunks[-1].start > size - 64 * len(chunks)


def test_the_longest_rows_come_one_by_one() -> None:
    assert list(token_chunks(2, chunk_size(2, 10**9, CPU))) == [slice(0, 1), slice(1, 2)]
    assert chunk_size(1000, 700_000, CPU) == CHUNK_BYTES["cpu"] // (4 * 700_000)  # fewer than 64, but not one by one
    assert list(token_chunks(0, 64)) == []
