"""What a vLLM engine is built with, and vLLM's complaints about it in the words of our flags."""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_camopd.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """What an engine is built with; lengths in tokens.

    model_folder          folder that holds the Hugging Face ``config.json``; nothing else of it is read
    dtype                 "float32" or "bfloat16", of weights and cache
    temperature           of sampling; 0 is greedy, with log-probabilities at temperature 1
    end_of_sequence_ids   every id that ends a response; those in the model folder do not count
    vocab_size            ids that can be drawn, without padding
    tensor_parallel_size  ranks of one engine; divides the world
    memory_share          CUDA: share of the GPU's memory that an engine may take, weights included
    kv_cache_bytes        memory of the cache on each rank; required on CPU, None on CUDA: what the share leaves
    max_sequences         sequences decoded at once by one engine
    sleep                 CUDA: give weights and cache back after each :meth:`~.vllm_engine.VllmEngine.generate`
    time_limit            seconds that sampling a step may take; 0: no limit
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
    """Errors: ConfigurationError for attention heads that vLLM has no CPU kernel for; it would find out in sampling."""
    backend = importlib.import_module("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend
    sizes = backend.get_supported_head_sizes()
    if size not in sizes:
        raise ConfigurationError(
            f"--rollout-engine vllm: the model's head dimension is {size}; vLLM's CPU kernels have "
            f"{', '.join(map(str, sizes))}; use --rollout-engine megatron"
        )


def explain(error: Exception, settings: VllmSettings) -> ConfigurationError | None:
    """An ``error`` of vLLM's start in the words of our flags, where it is one of settings or memory."""
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
