"""Settings of a vLLM engine, and vLLM's errors about them in terms of our flags."""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_camopd.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """Settings from which a vLLM engine is built.

    Attributes:
        model_folder: Folder with the Hugging Face ``config.json``; nothing else in it is read.
        dtype: Dtype of weights and KV cache, "float32" or "bfloat16".
        seed: The run's seed.
        temperature: Sampling temperature; 0 takes the most likely token, with log-probabilities at temperature 1.
        end_of_sequence_ids: All token ids that end a response; those in the model folder are ignored.
        max_prompt_length: Largest number of tokens of a prompt.
        max_response_length: Largest number of tokens of a response.
        vocab_size: Number of token ids that can be sampled, without padding.
        tensor_parallel_size: Ranks of one engine; divides the world size.
        memory_share: Share of the GPU's memory that an engine may take, weights included; CUDA only.
        kv_cache_bytes: Size of the KV cache on each rank; required on CPU. None on CUDA: what ``memory_share`` leaves.
        max_sequences: Largest number of sequences that one engine decodes at once.
        enforce_eager: Run without CUDA graphs.
        prefix_caching: Compute only once a prefix that several prompts share.
        sleep: Free weights and cache after each :meth:`~.vllm_engine.VllmEngine.generate`; CUDA only.
        time_limit: Seconds that sampling a step may take; 0: no limit.
        progress: Whether to show a progress bar, if the console is a terminal.
    """

    model_folder: str
    dtype: str
    seed: int
    temperature: float
    end_of_sequence_ids: Sequence[int]
    max_prompt_length: int
    max_response_length: int
    vocab_size: int
    tensor_parallel_size: int = 1
    memory_share: float = 0.5
    kv_cache_bytes: int | None = None
    max_sequences: int = 256
    enforce_eager: bool = False
    prefix_caching: bool = True
    sleep: bool = True
    time_limit: float = 0.0
    progress: bool = False


def check_head_size(size: int) -> None:
    """Check that vLLM has a CPU kernel for attention heads of dimension ``size``; vLLM itself checks in sampling only.

    Raises:
        ConfigurationError: There is no such kernel.
    """
    backend = importlib.import_module("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend
    sizes = backend.get_supported_head_sizes()
    if size not in sizes:
        raise ConfigurationError(
            f"--rollout-engine vllm: the model's head dimension is {size}; vLLM's CPU kernels have "
            f"{', '.join(map(str, sizes))}; use --rollout-engine megatron"
        )


def explain(error: Exception, settings: VllmSettings) -> ConfigurationError | None:
    """Return an ``error`` of vLLM's start in terms of our flags, or None if neither settings nor memory caused it."""
    text = " ".join(str(error).split())
    memory = f"--rollout-memory-share {settings.memory_share}"
    if settings.kv_cache_bytes is not None and "GPU memory utilization" not in text:
        memory = f"--rollout-kv-cache-bytes {settings.kv_cache_bytes}"
    if isinstance(error, torch.OutOfMemoryError) or re.search("memory .*is less than", text, re.IGNORECASE):
        return ConfigurationError(f"{memory}: more than is free when the engine starts; lower it ({text[:300]})")
    if "No available memory" in text or "max seq len" in text:
        return ConfigurationError(
            f"{memory}: too little for one sequence of --max-prompt-length {settings.max_prompt_length} and "
            f"--max-response-length {settings.max_response_length}; raise it or lower these ({text[:300]})"
        )
    if isinstance(error, ValueError):
        return ConfigurationError(f"--rollout-engine vllm: vLLM refuses these settings ({text[:300]})")
    return None
