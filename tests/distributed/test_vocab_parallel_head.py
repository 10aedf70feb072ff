"""The head operations with the vocabulary over two gloo processes: the same bits on both, and the same as on one.

On both back ends of the row operations; Triton runs in its interpreter. The processes start once and run every case;
each test compares one.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels import distill_head, linear_logprob, sample_ids
from tests.support.head_problems import BACK_ENDS, triton_is_unusable, use_back_end
from tests.support.processes import run_ranks

RANKS = 2
WIDTH = 8  # columns of a shard

# name: operation, options. valid_vocab_size 11 leaves the second shard 3 real columns, 6 leaves it none.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "logprob": ("logprob", {}),
    "logprob-tempered-chunks": ("logprob", {"temperature": 0.7, "chunk_tokens": 4}),
    "logprob-phantom": ("logprob", {"valid_vocab_size": 11, "chunk_tokens": 5}),
    "logprob-phantom-shard": ("logprob", {"valid_vocab_size": 6}),
    "logprob-top": ("logprob", {"top_k": 5}),
    "logprob-top-more-than-a-shard": ("logprob", {"top_k": 10, "valid_vocab_size": 11, "chunk_tokens": 5}),
    "logprob-top-ties": ("logprob", {"top_k": 9, "tied_rows": True}),
    "sample": ("sample", {}),
    "sample-phantom": ("sample", {"valid_vocab_size": 11, "temperature": 0.7, "chunk_tokens": 5}),
    "sample-phantom-shard": ("sample", {"valid_vocab_size": 6}),
    "distill": ("distill", {}),
    "distill-clip-chunks": ("distill", {"importance": ("clip", 0.5, 2.0), "temperature": 0.7, "chunk_tokens": 4}),
    "distill-floor-none": ("distill", {"importance": ("none", 0.5, 5.0), "advantage_floor": -0.3}),
    "distill-phantom": ("distill", {"valid_vocab_size": 11, "chunk_tokens": 5}),
    "distill-phantom-shard": ("distill", {"valid_vocab_size": 6}),
    "distill-peaked": ("distill", {"temperature": 0.1, "importance": ("none", 0.5, 5.0)}),
    "distill-empty": ("distill", {"tokens": 0}),
    "distill-bf16": ("distill", {"dtype": torch.bfloat16, "importance": ("clip", 0.5, 2.0)}),
    "distill-into": ("distill-into", {"chunk_tokens": 4}),
    "distill-into-phantom-shard": ("distill-into", {"valid_vocab_size": 6}),
}

# Token 4 asks for a phantom column of the second shard, and so does token 7, whose coefficient is 0.
IMPOSSIBLE = {"distill-impossible": ("distill", {"valid_vocab_size": 11, "phantom_targets": [4, 7]})}


def run_case(
    name: str, rank: int, group: dist.ProcessGroup | None, *, reduce_hidden_grad: bool = True
) -> dict[str, Tensor]:
    """One case on this rank's columns (all of them without a group): outputs and gradients."""
    operation, options = (CASES | IMPOSSIBLE)[name]
    options = dict(options)
    tokens, hidden_size, dtype = options.pop("tokens", 13), 5, options.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(RANKS * WIDTH, hidden_size, generator=generator).to(dtype)
    if options.pop("tied_rows", False):  # equal logits on both sides of the border between the shards
        weight = weight[torch.arange(RANKS * WIDTH) % 3]
    weight = (weight if group is None else weight[rank * WIDTH : (rank + 1) * WIDTH].clone()).requires_grad_()
    targets = torch.randint(0, options.get("valid_vocab_size", RANKS * WIDTH), (tokens, 3), generator=generator)
    floats = -3.0 * torch.rand(4, tokens, generator=generator)
    if phantoms := options.pop("phantom_targets", []):
        targets[phantoms], floats[2, phantoms[1]] = options["valid_vocab_size"], 0.0
    if operation == "sample":
        uniforms = torch.rand(tokens, 6, generator=generator, dtype=torch.float64)
        ids, logprob = sample_ids(hidden, weight, uniforms, tp_group=group, **options)
        return {"ids": ids, "logprob": logprob}
    settings = options | {"tp_group": group, "reduce_hidden_grad": reduce_hidden_grad}
    if operation == "logprob":
        returned = linear_logprob(hidden, weight, targets, **settings)
        (returned[0] * floats[:3].t()).sum().backward()
        outputs = dict(zip(("logprob", "entropy", "top"), (value.detach() for value in returned), strict=False))
    else:
        into = torch.ones_like(weight, requires_grad=False) if operation == "distill-into" else None
        settings |= {"weight_gradient": into, "loss_gradient": 2.0}
        loss, logprob = distill_head(hidden, weight, targets[:, 0], floats[0], floats[1] - 1.0, -floats[2], **settings)
        (2.0 * loss).backward()
        outputs = {"loss": loss.detach(), "logprob": logprob}
        if into is not None:
            assert weight.grad is None
            weight.grad = into - 1.0
    assert hidden.grad is not None and weight.grad is not None
    return outputs | {"hidden_grad": hidden.grad, "weight_grad": weight.grad}


def rank_main() -> dict[str, Any]:
    rank, group = dist.get_rank(), dist.new_group(list(range(RANKS)))
    assert group is not None
    whole, partial = {}, {}
    for back_end in [back_end for back_end in BACK_ENDS if back_end == "torch" or not triton_is_unusable()]:
        with pytest.MonkeyPatch.context() as patch:
            use_back_end(back_end, patch)
            for name in CASES | IMPOSSIBLE:
                whole[back_end, name] = run_case(name, rank, group)
                part = run_case(name, rank, group, reduce_hidden_grad=False)
                partial[back_end, name] = part.get("hidden_grad")
    # A group of one behaves like no group.
    single = [dist.new_group([member]) for member in range(RANKS)][rank]
    options = {"tp_group": single}
    alone = linear_logprob(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 3]), **options)[0]
    return {"whole": whole, "partial": partial, "alone": alone}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(rank_main, RANKS)


def result_of(saved: dict[str, Any], what: str, back_end: str, name: str) -> Any:
    """Return the results of one rank; the test is skipped where that back end did not run."""
    if (back_end, name) not in saved[what]:
        pytest.skip(triton_is_unusable())
    return saved[what][back_end, name]


def assert_alike(actual: Any, expected: Tensor, name: str) -> None:
    """In fp32 to 1e-5; 16 bits round the logits' gradient, the shards' parts and their sum, by 2^-9 of the largest."""
    narrow = CASES[name][1].get("dtype") == torch.bfloat16 and expected.dim() == 2
    atol = 2.0**-7 * expected.abs().max().item() if narrow else 1e-5
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=1e-5, atol=atol, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("name", list(CASES))
def test_two_shards_equal_one(name: str, back_end: str, ranks: list[dict[str, Any]]) -> None:
    expected = run_case(name, 0, None)
    results = [result_of(saved, "whole", back_end, name) for saved in ranks]
    for result in results:
        for key in set(expected) - {"weight_grad"}:
            assert_alike(result[key], expected[key], name)
            assert torch.equal(result[key], results[0][key]), f"{name}: ranks disagree about {key}"
    if "weight_grad" in expected:
        weight_grad = torch.cat([result["weight_grad"] for result in results])
        assert_alike(weight_grad, expected["weight_grad"], name)
        if name != "distill-empty":
            assert expected["hidden_grad"].abs().max() > 1e-2 and expected["weight_grad"].abs().max() > 1e-2


def test_equal_logits_go_by_id(ranks: list[dict[str, Any]]) -> None:
    """The weight's rows repeat every third: the first ids are those of one of the three rows, in order."""
    for row in ranks[0]["whole"]["torch", "logprob-top-ties"]["top"].tolist():
        for place in (0, 5 if row[0] % 3 else 6):  # ids 0, 3 .. 15 are six, the others five
            assert row[place] < 3
        assert [id for id in row if id % 3 == row[0] % 3] == list(range(row[0], RANKS * WIDTH, 3))


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("name", [name for name, (operation, _) in CASES.items() if operation != "sample"])
def test_partial_hidden_gradients_sum_to_the_whole(name: str, back_end: str, ranks: list[dict[str, Any]]) -> None:
    parts = [result_of(saved, "partial", back_end, name) for saved in ranks]
    whole = result_of(ranks[0], "whole", back_end, name)["hidden_grad"]
    assert_alike(sum(part.float() for part in parts), whole, name)
    if name.endswith("phantom-shard"):
        assert parts[1].eq(0.0).all()
    elif name != "distill-empty":
        assert all(part.abs().max() > 1e-3 for part in parts)


@pytest.mark.parametrize("name", ["logprob-phantom-shard", "distill-phantom-shard", "distill-into-phantom-shard"])
def test_phantom_shard_gets_no_gradient(name: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["whole"]["torch", name]["weight_grad"].eq(0.0).all()
    assert ranks[0]["whole"]["torch", name]["weight_grad"][6:].eq(0.0).all()


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_phantom_id_that_counts_is_nan_on_every_rank(back_end: str, ranks: list[dict[str, Any]]) -> None:
    for saved in ranks:
        result = result_of(saved, "whole", back_end, "distill-impossible")
        assert result["loss"].isnan() and result["logprob"][4] == -torch.inf and result["weight_grad"].isnan().any()
        hidden_grad = result["hidden_grad"]
        assert hidden_grad[4].isnan().all() and hidden_grad[[n for n in range(13) if n != 4]].isfinite().all()


def test_group_of_one_is_no_group(ranks: list[dict[str, Any]]) -> None:
    expected = torch.log_softmax(torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), dim=0)[[0, 3]].float()
    for saved in ranks:
        torch.testing.assert_close(saved["alone"], expected)
