"""Arguments of Megatron that follow from the machine: without CUDA, and on CUDA without Apex or Transformer Engine."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.accelerator import Accelerator

accelerator.activate()  # before Megatron is imported

APEX = ("fused_weight_gradient_mlp_cuda", "scaled_upper_triang_masked_softmax_cuda")


def on_cuda(monkeypatch: pytest.MonkeyPatch, *, apex: bool, transformer_engine: bool) -> None:
    """Simulate a CUDA machine with or without the packages that compile extensions."""
    monkeypatch.setattr(accelerator, "current", lambda: Accelerator("cuda", "nccl", torch.device("cuda", 0)))
    monkeypatch.setattr(accelerator, "has_transformer_engine", lambda: transformer_engine)
    for name in APEX:
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if apex else None)


def megatron_defaults() -> Namespace:
    """Megatron's own defaults, as its parser has them."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    return parser.parse_args([])


@pytest.mark.parametrize("apex", [True, False])
@pytest.mark.parametrize("transformer_engine", [True, False])
def test_fusions_without_their_extension_are_off(
    apex: bool, transformer_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda(monkeypatch, apex=apex, transformer_engine=transformer_engine)
    wanted = {} if apex else {"gradient_accumulation_fusion": False, "masked_softmax_fusion": False}
    wanted |= {} if transformer_engine else {"apply_rope_fusion": False}
    assert accelerator.required_arguments() == wanted
    defaults = vars(megatron_defaults())
    assert all(defaults[name] is True for name in wanted)  # else there was no need


def test_layers_without_transformer_engine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = megatron_defaults()
    on_cuda(monkeypatch, apex=False, transformer_engine=False)
    vars(args).update(accelerator.required_arguments())
    with pytest.raises(ConfigurationError) as caught:
        accelerator.check_arguments(args)
    line = str(caught.value)
    assert line.startswith("--transformer-impl is transformer_engine, but Transformer Engine is not installed")
    assert "make setup EXTRAS=gpu" in line and "--transformer-impl local" in line and "\n" not in line
    args.transformer_impl = "local"
    accelerator.check_arguments(args)
    args.apply_rope_fusion = True
    with pytest.raises(ConfigurationError, match="--apply-rope-fusion is True, but a machine without that CUDA"):
        accelerator.check_arguments(args)


def test_defaults_pass_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    args = megatron_defaults()
    on_cuda(monkeypatch, apex=False, transformer_engine=True)
    vars(args).update(accelerator.required_arguments())
    accelerator.check_arguments(args)


def test_without_cuda() -> None:
    args = megatron_defaults()
    needed = accelerator.required_arguments()
    assert needed == accelerator.cpu_required_arguments()
    assert needed["transformer_impl"] == "local" and needed["distributed_backend"] == "gloo"
    assert needed.keys() <= vars(args).keys()
    vars(args).update(needed)
    accelerator.check_arguments(args)
    args.distributed_backend = "nccl"
    message = "--distributed-backend is nccl, but a machine without CUDA needs gloo; drop the flag"
    with pytest.raises(ConfigurationError, match=message):
        accelerator.check_arguments(args)


def test_an_extension_that_does_not_load_counts_as_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("raise ImportError('undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(accelerator, "current", lambda: Accelerator("cuda", "nccl", torch.device("cuda", 0)))
    assert accelerator.required_arguments()["gradient_accumulation_fusion"] is False
