"""Small models with experts, as Hugging Face folders and as checkpoints, and their weights on a parallel layout."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_camopd.checkpoint.import_hf import import_hf
from tests.support.worlds import EXPERTS, SIZES, make_tokenizer

TRAINED: dict[str, Any] = {"vocab_size": 300, "num_hidden_layers": 4, "initializer_range": 0.2, **EXPERTS}
"""Sizes of models that are trained, beside those of ``worlds.SIZES``."""
FOUR = {"num_hidden_layers": 4, "head_dim": 16}
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "top2-fp32": (FOUR, torch.float32),
    "top4-fp32": (FOUR | {"num_experts_per_tok": 4, "norm_topk_prob": False}, torch.float32),
    "top4-normalised-fp32": (FOUR | {"num_experts_per_tok": 4}, torch.float32),
    "top2-plain-fp32": (FOUR | {"norm_topk_prob": False, "tie_word_embeddings": True}, torch.float32),
    "mixed-fp32": (FOUR | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, torch.float32),
    "mixed-half-fp32": (FOUR | {"decoder_sparse_step": 2, "tie_word_embeddings": True}, torch.float32),
    "top2-bf16": (FOUR | {"tie_word_embeddings": True}, torch.bfloat16),
    "mixed-bf16": (FOUR | {"mlp_only_layers": [2]}, torch.bfloat16),
}


class Models:
    """Variants of a model below the folder ``root``, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, variant: str) -> Path:
        """Hugging Face folder in shards, with random weights of a size that makes every one of them matter."""
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        folder = self.root / "hf" / variant
        if not folder.exists():
            changes, dtype = VARIANTS[variant]
            torch.manual_seed(7)
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(SIZES | EXPERTS | changes))).to(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name))
            model.save_pretrained(folder, max_shard_size="60KB")
            make_tokenizer().save_pretrained(folder)
        return folder

    def checkpoint(self, variant: str) -> Path:
        """Megatron checkpoint directory that the importer makes of it."""
        target = self.root / "megatron" / variant
        return target if target.exists() else import_hf(self.folder(variant), target)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, read with the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def is_mixed(variant: str) -> bool:
    return variant.startswith("mixed")


def loaded_model(checkpoint: str, sizes: dict[str, int]) -> tuple[Any, Any]:
    """Arguments and model of this rank, with the weights of ``checkpoint``; runs refuse some of these layouts."""
    from megatron_camopd.checkpoint import arguments
    from megatron_camopd.checkpoint.directory import require_checkpoint
    from megatron_camopd.checkpoint.training_state import load_weights
    from megatron_camopd.model.builder import build_model
    from megatron_camopd.model.output_head import HeadSettings
    from megatron_camopd.runtime.startup import initialize_megatron

    flags = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    if sizes.get("tensor_model_parallel_size", 1) > 1:
        flags.append("--sequence-parallel")
    args, _ = arguments.parse_command_line(
        ["--load", checkpoint, "--global-batch-size", "4", *flags], [HeadSettings], {}
    )
    args.resume, args.resumed, args.camopd_state = False, None, None
    arguments._take_architecture(args, {})
    args.seq_length = args.max_position_embeddings
    arguments._validate(args)
    args.padded_vocab_size = arguments.padded_vocab_size(args)
    initialize_megatron(args)
    (model,) = build_model(args, trainable=False)
    load_weights(args, [model], require_checkpoint("--load", checkpoint))
    return args, model


def float64_model(folder: Path) -> Any:
    """Hugging Face's model in float64, with its plain attention and experts one by one."""
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def named_gradients(network: Any) -> dict[str, Tensor]:
    """Gradients by the names of the files, in which experts are apart; transformers stacks them in memory."""
    found: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert, gradient in enumerate(parameter.grad):
                gate, up = gradient.chunk(2)
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}."
                found |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            found |= {
                f"{name.removesuffix('down_proj')}{n}.down_proj.weight": part for n, part in enumerate(parameter.grad)
            }
        else:
            found[name] = parameter.grad
    return found
