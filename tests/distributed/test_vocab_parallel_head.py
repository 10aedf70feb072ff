"""The head operations with the vocabulary over two gloo processes: the same bits on both, and the same as on one.

The processes start once, run every case and leave their tensors in files; each test compares one case.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_camopd.kernels import distill_head, linear_logprob

RANKS = 2
TIME_LIMIT_S = 120.0
WIDTH = 8  # columns of a shard

# name: operation, options. valid_vocab_size 11 leaves the second shard 3 real columns, 6 leaves it none.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "logprob": ("logprob", {}),
    "logprob-tempered-chunks": ("logprob", {"temperature": 0.7, "chunk_tokens": 4}),
    "logprob-phantom": ("logprob", {"valid_vocab_size": 11, "chunk_tokens": 5}),
    "logprob-phantom-shard": ("logprob", {"valid_vocab_size": 6}),
    "distill": ("distill", {}),
    "distill-clip-chunks": ("distill", {"importance": ("clip", 0.5, 2.0), "temperature": 0.7, "chunk_tokens": 4}),
    "distill-floor-none": ("distill", {"importance": ("none", 0.5, 5.0), "advantage_floor": -0.3}),
    "distill-phantom": ("distill", {"valid_vocab_size": 11, "chunk_tokens": 5}),
    "distill-phantom-shard": ("distill", {"valid_vocab_size": 6}),
    "distill-peaked": ("distill", {"temperature": 0.1, "importance": ("none", 0.5, 5.0)}),
    "distill-empty": ("distill", {"tokens": 0}),
}


def run_case(
    name: str, rank: int, group: dist.ProcessGroup | None, *, reduce_hidden_grad: bool = True
) -> dict[str, Tensor]:
    """One case on this rank's columns (all of them without a group): outputs and gradients."""
    operation, options = CASES[name]
    options = dict(options)
    tokens, hidden_size = options.pop("tokens", 13), 5
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(RANKS * WIDTH, hidden_size, generator=generator)
    weight = (weight if group is None else weight[rank * WIDTH : (rank + 1) * WIDTH].clone()).requires_grad_()
    targets = torch.randint(0, options.get("valid_vocab_size", RANKS * WIDTH), (tokens, 3), generator=generator)
    floats = -3.0 * torch.rand(4, tokens, generator=generator)
    settings = options | {"tp_group": group, "reduce_hidden_grad": reduce_hidden_grad}
    if operation == "logprob":
        logprob, entropy = linear_logprob(hidden, weight, targets, **settings)
        (logprob * floats[:3].t()).sum().backward()
        outputs = {"logprob": logprob.detach(), "entropy": entropy}
    else:
        loss, logprob = distill_head(hidden, weight, targets[:, 0], floats[0], floats[1] - 1.0, -floats[2], **settings)
        (2.0 * loss).backward()
        outputs = {"loss": loss.detach(), "logprob": logprob}
    assert hidden.grad is not None and weight.grad is not None
    return outputs | {"hidden_grad": hidden.grad, "weight_grad": weight.grad}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        group = dist.new_group(list(range(RANKS)))
        assert group is not None
        whole = {name: run_case(name, rank, group) for name in CASES}
        partial = {name: run_case(name, rank, group, reduce_hidden_grad=False)["hidden_grad"] for name in CASES}
        # A group of one behaves like no group.
        single = [dist.new_group([member]) for member in range(RANKS)][rank]
        options = {"tp_group": single}
        alone = linear_logprob(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 3]), **options)[0]  # type: ignore[arg-type]
        torch.save({"whole": whole, "partial": partial, "alone": alone}, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes saved. They are killed when they take too long."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(worker, args=(str(folder),), nprocs=RANKS, join=False)
    deadline = time.monotonic() + TIME_LIMIT_S
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes did not finish within {TIME_LIMIT_S} s")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", list(CASES))
def test_two_shards_equal_one(name: str, ranks: list[dict[str, Any]]) -> None:
    expected = run_case(name, 0, None)
    results = [saved["whole"][name] for saved in ranks]
    for result in results:
        for key in set(expected) - {"weight_grad"}:
            torch.testing.assert_close(result[key], expected[key], rtol=1e-5, atol=1e-5, msg=f"{name}: {key} differs")
            assert torch.equal(result[key], results[0][key]), f"{name}: ranks disagree about {key}"
    weight_grad = torch.cat([result["weight_grad"] for result in results])
    torch.testing.assert_close(weight_grad, expected["weight_grad"], rtol=1e-5, atol=1e-5)
    if name != "distill-empty":
        assert expected["hidden_grad"].abs().max() > 1e-2 and expected["weight_grad"].abs().max() > 1e-2


@pytest.mark.parametrize("name", list(CASES))
def test_partial_hidden_gradients_sum_to_the_whole(name: str, ranks: list[dict[str, Any]]) -> None:
    parts = [saved["partial"][name] for saved in ranks]
    torch.testing.assert_close(sum(parts), ranks[0]["whole"][name]["hidden_grad"], rtol=1e-5, atol=1e-5)
    if name.endswith("phantom-shard"):
        assert parts[1].eq(0.0).all()
    elif name != "distill-empty":
        assert all(part.abs().max() > 1e-3 for part in parts)


def test_phantom_shard_gets_no_gradient(ranks: list[dict[str, Any]]) -> None:
    for name in ("logprob-phantom-shard", "distill-phantom-shard"):
        assert ranks[1]["whole"][name]["weight_grad"].eq(0.0).all()
        assert ranks[0]["whole"][name]["weight_grad"][6:].eq(0.0).all()


def test_group_of_one_is_no_group(ranks: list[dict[str, Any]]) -> None:
    expected = torch.log_softmax(torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), dim=0)[[0, 3]].float()
    for saved in ranks:
        torch.testing.assert_close(saved["alone"], expected)
