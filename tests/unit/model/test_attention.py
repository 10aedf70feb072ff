"""Attention of local layers against a float64 computation, sequence by sequence and head by head."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_camopd.runtime import accelerator

LENGTHS = [37, 90, 16, 55, 1]
HEADS, GROUPS, WIDTH = 6, 2, 16


def attention(dropout: float = 0.0) -> Any:
    accelerator.activate()
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_camopd.model.attention import PlainAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=WIDTH,
        attention_dropout=dropout, tensor_model_parallel_size=2, sequence_parallel=True,
    )  # fmt: skip
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    return PlainAttention(config, 1, AttnMaskType.causal, "self", pg_collection=alone)


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence [L, heads, D], the last query at the last key, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    result = torch.zeros_like(query)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        for place in range(len(query)):
            seen = len(key) - len(query) + place + 1
            scores = key[:seen, group] @ query[place, head] / math.sqrt(WIDTH)
            result[place, head] = torch.softmax(scores, dim=0) @ value[:seen, group]
    return result


def tensors(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(*shape, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


def packed(lengths: list[int]) -> Any:
    from megatron_camopd.model.attention import PackedSequences

    return PackedSequences(qkv_format="thd", lengths=tuple(lengths))


def test_packed_sequences_and_their_gradients() -> None:
    given = tensors(sum(LENGTHS))
    found = attention()(*given, None, packed_seq_params=packed(LENGTHS))
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    parts = zip(*(tensor.split(LENGTHS) for tensor in exact), strict=True)
    expected = torch.cat([reference(*part) for part in parts])
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (1, 1)])
def test_batches_of_prompts_and_of_single_tokens(queries: int, keys: int) -> None:
    query = tensors(queries, 3)[0]
    _, key, value = tensors(keys, 3, seed=1)
    found = attention()(query, key, value, None)
    assert found.shape == (queries, 3, HEADS * WIDTH)
    for row in range(3):
        expected = reference(query[:, row], key[:, row], value[:, row]).flatten(1)
        torch.testing.assert_close(found[:, row].double(), expected, rtol=1e-5, atol=1e-6)


def test_dropout_only_while_training() -> None:
    given, module = tensors(40), attention(dropout=0.5)
    plain = attention()(*given, None, packed_seq_params=packed([40]))
    assert torch.equal(module.eval()(*given, None, packed_seq_params=packed([40])), plain)
    assert not torch.allclose(module.train()(*given, None, packed_seq_params=packed([40])), plain)
