"""Checksums of weights, the comparison of an engine's weights with what was sent, and the probe."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.errors import StaleEngineError
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.qwen3 import FAMILY
from megatron_camopd.rollout import checksum as checksum_module
from megatron_camopd.rollout.checksum import checksum
from megatron_camopd.rollout.freshness import (
    TOLERANCES,
    EngineWeights,
    Tolerance,
    mismatch_warning,
    probe_engine,
    probe_prompts,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, HEAD_DIM, HIDDEN, FFN, VOCABULARY, LAYERS = 8, 4, 24, 40, 300, 2


# Checksums --------------------------------------------------------------------------------------------------------


def random_matrix(dtype: torch.dtype = torch.float32, rows: int = 37, columns: int = 19) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)).to(dtype)


def reference_checksum(tensor: Tensor, row: int = 0, column: int = 0) -> int:
    """The definition in unbounded integers, element by element."""

    def factor(place: int, salt: int) -> int:
        value = (place + salt + 0x9E3779B97F4A7C15) % 2**64  # SplitMix64
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ value >> shift) * multiplier % 2**64
        return (value ^ value >> 31) | 1

    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    matrix = tensor if tensor.dim() == 2 else tensor[:, None]
    total = 0
    for i, line in enumerate(matrix.contiguous().view(integers).tolist()):
        for j, bits in enumerate(line):
            total += factor(row + i, 0x5851F42D4C957F2D) * factor(column + j, 0x14057B7EF767814F) * bits
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_is_its_definition(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(dtype)
    expected = reference_checksum(matrix, 5, 11)
    for block in (1, 50, 1 << 20):
        monkeypatch.setattr(checksum_module, "_BLOCK", block)
        assert int(checksum(matrix, row=5, column=11)) == expected
    assert int(checksum(matrix.t().contiguous().t(), row=5, column=11)) == expected, "strides count"
    assert int(checksum(matrix[:, 3], row=2)) == reference_checksum(matrix[:, 3], 2)


def test_checksums_of_pieces_add_up() -> None:
    matrix = random_matrix()
    whole = checksum(matrix)
    rows = [checksum(part, row=start) for start, part in ((0, matrix[:10]), (10, matrix[10:11]), (11, matrix[11:]))]
    columns = [checksum(matrix[:, :7]), checksum(matrix[:, 7:], column=7)]
    assert torch.equal(sum(rows), whole) and torch.equal(sum(columns), whole)
    assert int(checksum(matrix[:0])) == 0
    assert not torch.equal(checksum(matrix[:10]) + checksum(matrix[10:], row=11), whole), "offsets do not count"


def test_checksum_casts_like_the_tensor() -> None:
    matrix = random_matrix()
    assert torch.equal(checksum(matrix, dtype=torch.bfloat16), checksum(matrix.bfloat16()))
    # Bits alone: the same integers under another dtype, but not the same numbers with other bits.
    half = random_matrix(torch.bfloat16)
    assert torch.equal(checksum(half), checksum(half.view(torch.float16)))
    assert not torch.equal(checksum(half), checksum(half.float()))


def test_every_single_bit_counts() -> None:
    matrix = random_matrix(torch.bfloat16, 6, 5)
    seen = {int(checksum(matrix))}
    for place in range(matrix.numel()):
        for bit in range(16):
            changed = matrix.clone().view(torch.int16)
            changed.view(-1)[place] ^= -(2**15) if bit == 15 else 1 << bit
            seen.add(int(checksum(changed.view(torch.bfloat16))))
    assert len(seen) == 1 + matrix.numel() * 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[[1, 0, *range(2, 37)]],
        lambda m: m[:, [1, 0, *range(2, 19)]],
        lambda m: m.roll(1, 0),
        lambda m: m.flip(0),
        lambda m: m.flip(0, 1),
        lambda m: -m,
        lambda m: torch.where(torch.arange(19) < 2, -m, m),
        lambda m: m.view(19, 37).t().contiguous().view(37, 19),
        lambda m: torch.cat((m[:18], m[19:], m[18:19])),
        lambda m: m.nextafter(m + 1) if m.dtype is torch.float32 else m * 1.01,
    ],
    ids=["rows", "columns", "roll", "flip", "turn", "signs", "two columns' signs", "reshaped", "one row", "last bits"],
)
def test_structured_changes_count(dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> None:
    matrix = random_matrix(dtype)
    assert not torch.equal(change(matrix), matrix)
    assert int(checksum(change(matrix))) != int(checksum(matrix))


# An engine's weights ----------------------------------------------------------------------------------------------


def architecture(*, groups: int, tied: bool) -> Architecture:
    return Architecture(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_heads=HEADS, num_query_groups=groups,
        head_dim=HEAD_DIM, vocab_size=VOCABULARY, max_positions=64, rope_theta=1e4, norm_epsilon=1e-6, tied=tied,
        dtype=None,
    )  # fmt: skip


def random_weights(arch: Architecture, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in FAMILY.table.hf_shapes(arch).items()
    }
    if arch.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def vllm_parameters(weights: dict[str, Tensor], groups: int, rank: int, size: int) -> dict[str, Tensor]:
    """Return what vLLM's Qwen3 holds on one rank, head by head and row by row."""
    heads = HEADS // size
    queries = range(rank * heads, (rank + 1) * heads)
    key_heads = sorted({head // (HEADS // groups) for head in queries})  # the ones those query heads attend with

    def of_heads(matrix: Tensor, which: Sequence[int]) -> list[Tensor]:
        return [matrix[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in which]

    def block(rows: int) -> slice:
        return slice(rank * rows // size, (rank + 1) * rows // size)

    held: dict[str, Tensor] = {"model.norm.weight": weights["model.norm.weight"]}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = torch.cat((weights[name], torch.zeros(20, HIDDEN, dtype=weights[name].dtype)))[block(320)]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        q, k, v = (own[f"self_attn.{part}_proj.weight"] for part in "qkv")
        fused = {
            "self_attn.qkv_proj.weight": torch.cat(
                of_heads(q, queries) + of_heads(k, key_heads) + of_heads(v, key_heads)
            ),
            "self_attn.o_proj.weight": own["self_attn.o_proj.weight"][:, block(HEADS * HEAD_DIM)],
            "mlp.gate_up_proj.weight": torch.cat(
                [own[f"mlp.{part}_proj.weight"][block(FFN)] for part in ("gate", "up")]
            ),
            "mlp.down_proj.weight": own["mlp.down_proj.weight"][:, block(FFN)],
        }
        norms = {name: value for name, value in own.items() if "norm" in name}
        held |= {prefix + name: value for name, value in (fused | norms).items()}
    return {name: value.clone() for name, value in held.items()}


def watched(weights: dict[str, Tensor], arch: Architecture, rank: int, size: int) -> EngineWeights:
    engine = EngineWeights(FAMILY, arch, tp_rank=rank, tp_size=size)
    engine.restart()
    for name, tensor in weights.items():
        engine.record(name, tensor)
    return engine


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("groups", "size"), [(4, 1), (4, 2), (2, 2), (1, 2), (2, 4), (8, 4)])
def test_an_engine_that_took_over_everything_passes(groups: int, size: int, tied: bool) -> None:
    arch = architecture(groups=groups, tied=tied)
    weights = random_weights(arch, dtype=torch.bfloat16)
    for rank in range(size):
        held = vllm_parameters(weights, groups, rank, size)
        assert watched(weights, arch, rank, size).check(held.items()) == (3 + 8 * LAYERS, 0)
        for name, value in held.items():
            # Every element that comes from a weight is looked at: one at either end of each parameter.
            for place in (0, -1):
                if place == -1 and rank == size - 1 and name in ("model.embed_tokens.weight", "lm_head.weight"):
                    place = (VOCABULARY - 320 + len(value)) * HIDDEN - 1  # behind it is vLLM's padding
                changed = value.clone()
                changed.view(-1)[place] += 1
                with pytest.raises(StaleEngineError, match="is not what was sent"):
                    watched(weights, arch, rank, size).check((held | {name: changed}).items())


def packed(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Simulate a CPU, where vLLM empties the matrices that it has packed."""
    return {name: value.new_empty(0) if "proj" in name else value for name, value in held.items()}


def test_packed_matrices_are_counted_as_unreadable() -> None:
    arch = architecture(groups=4, tied=False)
    weights = random_weights(arch)
    held = packed(vllm_parameters(weights, 4, 1, 2))
    assert watched(weights, arch, 1, 2).check(held.items()) == (3 + 4 * LAYERS, 4 * LAYERS)
    held["model.layers.1.self_attn.k_norm.weight"] += 1e-3
    with pytest.raises(StaleEngineError, match=r"layers\.1\.self_attn\.k_norm"):
        watched(weights, arch, 1, 2).check(held.items())


def test_a_tied_engine_may_have_one_matrix_for_both() -> None:
    arch = architecture(groups=4, tied=True)
    weights = random_weights(arch)
    held = vllm_parameters(weights, 4, 0, 1)
    del held["lm_head.weight"]
    assert watched(weights, arch, 0, 1).check(held.items()) == (2 + 8 * LAYERS, 0)
    untied = architecture(groups=4, tied=False)
    with pytest.raises(StaleEngineError, match=r"has no parameter lm_head\.weight"):
        watched(weights, untied, 0, 1).check(held.items())


def faults(weights: dict[str, Tensor], old: dict[str, Tensor], rank: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what the message says, parameters as a faulty sync leaves them) at two ranks and four query groups."""
    fresh, stale = (vllm_parameters(values, 4, rank, 2) for values in (weights, old))
    qkv, gate_up = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"
    down, head = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"
    for name in ("model.norm.weight", down, head):
        yield rf"{name} is not", fresh | {name: stale[name]}
    only_q = torch.cat((fresh[qkv][:16], stale[qkv][16:]))
    yield r"layers\.1\.self_attn\.k_proj\.weight is not .*2 of", fresh | {qkv: only_q}
    only_gate = torch.cat((fresh[gate_up][:20], stale[gate_up][20:]))
    yield r"layers\.0\.mlp\.up_proj\.weight is not what was sent$", fresh | {gate_up: only_gate}
    other = vllm_parameters(weights, 4, 1 - rank, 2)
    for name, part in ((qkv, "q_proj"), (down, "down_proj"), ("model.embed_tokens.weight", "embed_tokens")):
        yield rf"{part}\.weight is not", fresh | {name: other[name]}
    yield r"has no parameter lm_head\.weight", {name: value for name, value in fresh.items() if name != head}
    yield r"has a parameter model\.extra", fresh | {"model.extra": torch.ones(3)}
    yield r"norm\.weight is torch\.bfloat16", fresh | {"model.norm.weight": fresh["model.norm.weight"].bfloat16()}
    yield r"down_proj\.weight has shape \(24, 40\); expected 24 rows of 20", fresh | {down: torch.ones(24, 40)}
    yield r"embed_tokens\.weight has shape", fresh | {"model.embed_tokens.weight": torch.ones(150, 24)}


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_faulty_sync_leaves_is_named(rank: int) -> None:
    arch = architecture(groups=4, tied=False)
    weights, old = random_weights(arch, 1), random_weights(arch, 2)
    found = 0
    for message, held in faults(weights, old, rank):
        with pytest.raises(StaleEngineError, match=message):
            watched(weights, arch, rank, 2).check(held.items())
        found += 1
    assert found == 13


def test_a_partial_set_is_refused_even_if_nothing_can_be_read() -> None:
    arch = architecture(groups=4, tied=True)
    weights = random_weights(arch)
    for missing in ("lm_head.weight", "model.layers.0.self_attn.k_proj.weight"):
        engine = watched({name: value for name, value in weights.items() if name != missing}, arch, 0, 1)
        with pytest.raises(StaleEngineError, match=f"{missing} was not sent"):
            engine.check(packed(vllm_parameters(weights, 4, 0, 1)).items())
    engine = watched(weights, arch, 0, 1)
    engine.restart()  # a second pass that ends early: what the first one saw does not count
    for name, tensor in list(weights.items())[:3]:
        engine.record(name, tensor)
    with pytest.raises(StaleEngineError, match="was not sent"):
        engine.check(vllm_parameters(weights, 4, 0, 1).items())


# The probe --------------------------------------------------------------------------------------------------------

BLOCK = 16


class CachingEngine:
    """Bigram sampler whose prompt is "computed" once: what the weights made of a prefix is cached for ever."""

    def __init__(self, weights: Tensor, *, cache: bool = True) -> None:
        self.weights = weights
        self.cache: dict[tuple[int, ...], Tensor] | None = {} if cache else None

    def prompt_state(self, prompt: Sequence[int]) -> Tensor:
        whole = len(prompt) // BLOCK * BLOCK
        prefix = self.weights[prompt[:whole]].sum(0)
        if self.cache is not None:
            prefix = self.cache.setdefault(tuple(prompt[:whole]), prefix)
        return prefix + self.weights[prompt[whole:]].sum(0)

    def generate(self, prompts: Sequence[Sequence[int]], indices: Tensor) -> RolloutBatch:
        rows, logprobs = [], []
        for prompt, index in zip(prompts, indices.tolist(), strict=True):
            distribution = self.prompt_state(prompt).log_softmax(-1)
            tokens = torch.arange(index, index + 3)
            rows.append(torch.cat((torch.tensor(prompt), tokens)))
            logprobs.append(distribution[tokens])
        lengths = torch.full((len(prompts),), 3)
        return RolloutBatch(
            indices=indices,
            tokens=torch.stack(rows),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            response_lengths=lengths,
            rollout_logprobs=torch.nn.functional.pad(torch.stack(logprobs).float(), (0, 2), value=7.0),
            truncated=torch.ones(len(prompts), dtype=torch.bool),
        )


def scoring(weights: Tensor) -> Callable[[RolloutBatch], Tensor]:
    engine = CachingEngine(weights, cache=False)

    def score(rollout: RolloutBatch) -> Tensor:
        again = engine.generate([row[:-3].tolist() for row in rollout.tokens], rollout.indices)
        return again.rollout_logprobs.where(rollout.response_mask, torch.zeros(()))

    return score


def test_probe_compares_engine_and_trainer() -> None:
    generator = torch.Generator().manual_seed(2)
    old, new = torch.randn(2, 50, 50, generator=generator)
    tolerance = TOLERANCES[torch.float32]
    prompts = probe_prompts(50, BLOCK + 4)
    assert {len(prompt) for prompt in prompts} == {20} and len({prompt[0] for prompt in prompts}) == 4
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    engine = CachingEngine(old)
    result = probe_engine(engine.generate, scoring(old), prompts, tolerance=tolerance)
    assert result == (0.0, 0.0)
    with pytest.raises(StaleEngineError, match="differ from the trainer's by"):
        probe_engine(engine.generate, scoring(new), prompts, tolerance=tolerance)  # a sync that did not happen
    engine.weights = new
    with pytest.raises(StaleEngineError):
        probe_engine(engine.generate, scoring(new), prompts, tolerance=tolerance)  # a cache that was not reset
    short = probe_prompts(50, BLOCK - 1)
    assert probe_engine(engine.generate, scoring(new), short, tolerance=tolerance).max == 0.0, "no block, no proof"
    engine.cache = {}
    assert probe_engine(engine.generate, scoring(new), prompts, tolerance=tolerance).max == 0.0


@pytest.mark.parametrize(
    ("offset", "tolerance", "sound"),
    [
        (torch.tensor([0.0, 0.0, 9e-4, 0.0, 0.0]), TOLERANCES[torch.float32], False),  # 3e-4 on average
        (torch.tensor([0.0, 0.0, 5e-4, 0.0, 0.0]), TOLERANCES[torch.float32], True),
        (torch.tensor([0.0, 2.9, 0.0, 0.0, 0.0]), Tolerance(1.0, 2.8), False),
        (torch.tensor([0.0, 2.9, 0.0, 5.0, 5.0]), Tolerance(1.0, 3.0), True),  # beyond the response: padding
        (torch.tensor([float("nan"), 0.0, 0.0, 0.0, 0.0]), Tolerance(1.0, 2.0), False),
        (torch.tensor([float("-inf"), 0.0, 0.0, 0.0, 0.0]), Tolerance(1.0, 2.0), False),
    ],
)
def test_probe_tolerates_by_mean_and_maximum(offset: Tensor, tolerance: Tolerance, sound: bool) -> None:
    weights = torch.randn(50, 50, generator=torch.Generator().manual_seed(2))
    score = scoring(weights)
    engine, prompts = CachingEngine(weights), probe_prompts(50, 20)

    def run() -> Any:
        return probe_engine(engine.generate, lambda rollout: score(rollout) + offset, prompts, tolerance=tolerance)

    if sound:
        assert run().max == pytest.approx(float(offset[:3].abs().max()), rel=1e-3)
    else:
        with pytest.raises(StaleEngineError):
            run()


def test_warning_of_a_mismatch() -> None:
    record = {
        "step": 4, "rollout_train_logprob_abs_diff": 0.3, "rollout_train_logprob_abs_diff_max": 2.0,
        "importance_effective_fraction": 0.5,
    }  # fmt: skip
    warning = mismatch_warning(record, 0.1)
    assert warning is not None and "step 4" in warning and "0.3 nats" in warning and "50%" in warning
    assert mismatch_warning(record | {"rollout_train_logprob_abs_diff": 0.05}, 0.1) is None
