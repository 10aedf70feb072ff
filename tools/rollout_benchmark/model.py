"""Checkpoints to measure with: Qwen3 of a preset's shape with random weights."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_camopd.checkpoint.assets import CONFIG, read_model
from megatron_camopd.checkpoint.hf_folder import SINGLE, NewTensor, write_shard
from megatron_camopd.checkpoint.import_hf import import_hf

INITIAL_STD = 0.02
PATIENCE = timedelta(minutes=30)  # how long the other ranks wait while the first writes a large checkpoint
_FOLDER_KEY = "benchmark_rollout_folder"
_COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}


@dataclass(frozen=True)
class Preset:
    """A model: ``sizes`` as in config.json, and the ``dtype`` of the stored weights."""

    sizes: dict[str, int]
    dtype: torch.dtype

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return _COMMON | self.sizes | {"dtype": str(self.dtype).removeprefix("torch.")}


PRESETS = {
    # 32 is the smallest head dimension of vLLM's CPU kernels.
    "tiny": Preset(
        {
            "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
        },
        torch.float32,
    ),
    "small": Preset(
        {
            "vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "head_dim": 64,
            "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 4096,
        },
        torch.float32,
    ),
    "qwen3-0.6b": Preset(
        _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        torch.bfloat16,
    ),
    "qwen3-4b": Preset(
        _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        torch.bfloat16,
    ),
}  # fmt: skip


def make_checkpoint(preset: Preset, folder: Path) -> Path:
    """Write a Megatron checkpoint below ``folder`` and return its directory.

    Matrices are normally distributed, norm weights are 1; they are the same in every call.
    """
    source = folder / "hf-random"
    source.mkdir()
    (source / CONFIG).write_text(json.dumps(preset.config), encoding="utf-8")
    family, arch = read_model(source)
    shapes = family.table.hf_shapes(arch)
    tensors = [NewTensor(name, preset.dtype, shape) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)

    def row_blocks(tensor: NewTensor) -> Iterator[torch.Tensor]:
        values = torch.ones(tensor.shape, dtype=tensor.dtype)
        yield values if values.dim() == 1 else values.normal_(std=INITIAL_STD, generator=generator)

    write_shard(source / SINGLE, tensors, row_blocks=row_blocks)
    _write_tokenizer(source)
    checkpoint = import_hf(source, folder / "checkpoint")
    (source / SINGLE).unlink()
    return checkpoint


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one id a byte, and one that ends a text, because a run does not start without."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(alphabet[:1])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0]).save_pretrained(folder)


@contextlib.contextmanager
def checkpoint_of(preset: Preset | None, load: Path | None) -> Iterator[tuple[Path, Path]]:
    """Provide the checkpoint to measure, and a path that does not exist, for the ``--save`` of the run.

    The checkpoint is ``load``, or else a new one of ``preset`` in a temporary folder, which the first rank makes and
    removes. The other ranks wait for it through a store, because no process group exists yet. All ranks must be on one
    machine.
    """
    if load is not None or preset is None:
        assert load is not None
        with tempfile.TemporaryDirectory(prefix="benchmark_rollout_") as name:
            yield load, Path(name, "run")
        return
    store = None if os.environ["WORLD_SIZE"] == "1" else next(iter(dist.rendezvous("env://")))[0]
    with contextlib.ExitStack() as stack:
        if store is None or os.environ["RANK"] == "0":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark_rollout_")))
            make_checkpoint(preset, folder)
            if store is not None:
                store.set(_FOLDER_KEY, str(folder))
        else:
            store.wait([_FOLDER_KEY], PATIENCE)
            folder = Path(store.get(_FOLDER_KEY).decode())
        yield folder / "checkpoint", folder / "run"
