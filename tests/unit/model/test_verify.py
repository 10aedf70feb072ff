"""``--verify``: the comparison does not depend on what the machine has compiled or which shortcuts it takes."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_camopd.runtime import accelerator

accelerator.activate()  # before Megatron is imported

from megatron_camopd.model import verify  # noqa: E402


class Built(Exception):
    """Raised where the model would be built."""


def test_layers_are_plain_whatever_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulate a GPU with Transformer Engine and Apex, whose defaults these are."""
    fused: dict[str, Any] = {name: True for name in accelerator.plain_arguments()}
    args = Namespace(**(fused | {"transformer_impl": "transformer_engine", "vocab_size": 300, "logging_level": None}))
    built: dict[str, Any] = {}

    def build(args: Namespace, *, trainable: bool) -> None:
        built.update(vars(args), trainable=trainable)
        raise Built

    monkeypatch.setattr(verify, "model_arguments", lambda checkpoint, groups: args)
    monkeypatch.setattr(verify, "single_process_environment", dict)
    monkeypatch.setattr(verify, "initialize_megatron", lambda args: None)
    monkeypatch.setattr(verify, "build_model", build)
    with pytest.raises(Built):
        verify.compare_logits(tmp_path, tmp_path)
    assert built["transformer_impl"] == "local" and not built["trainable"]
    assert built == built | accelerator.plain_arguments()
    assert built["attention_backend"].name == "unfused" and built["apply_rope_fusion"] is False


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_for_the_comparison_alone(before: bool) -> None:
    matmul = torch.backends.cuda.matmul
    initially, matmul.allow_tf32 = matmul.allow_tf32, before
    try:
        with pytest.raises(Built), verify._without_tf32():
            assert matmul.allow_tf32 is False
            raise Built
        assert matmul.allow_tf32 is before
    finally:
        matmul.allow_tf32 = initially
