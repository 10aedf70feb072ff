"""The rollout engine that the flags ask for: the one place that knows the engines' names."""

from argparse import Namespace
from collections.abc import Sequence

import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from megatron_camopd.checkpoint.assets import read_model, run_assets
from megatron_camopd.rollout.engine import RolloutEngine
from megatron_camopd.rollout.megatron_engine import MegatronEngine
from megatron_camopd.runtime import accelerator

_CPU_KV_CACHE_BYTES = 512 * 2**20


def build_engine(args: Namespace, model: Sequence[MegatronModule], end_of_sequence_ids: Sequence[int]) -> RolloutEngine:
    """The engine of ``--rollout-engine`` for the student ``model`` (this rank's chunks); collective over the world."""
    return _BUILDERS[args.rollout_engine](args, model, end_of_sequence_ids)


def _megatron(args: Namespace, model: Sequence[MegatronModule], end_of_sequence_ids: Sequence[int]) -> RolloutEngine:
    return MegatronEngine(
        model[0],
        seed=args.seed,
        temperature=args.rollout_temperature,
        end_of_sequence_ids=end_of_sequence_ids,
        max_response_length=args.max_response_length,
        vocab_size=args.vocab_size,
        batch_size=args.rollout_batch_size,
        progress=dist.get_rank() == 0,
    )


def _vllm(args: Namespace, model: Sequence[MegatronModule], end_of_sequence_ids: Sequence[int]) -> RolloutEngine:
    # Imported here: who does not ask for vLLM need not have it.
    from megatron_camopd.rollout.freshness import EngineWeights
    from megatron_camopd.rollout.proven_engine import ProvenEngine, WatchedSource
    from megatron_camopd.rollout.vllm_engine import VllmEngine
    from megatron_camopd.rollout.vllm_settings import VllmSettings
    from megatron_camopd.rollout.weight_sync import WeightSource

    folder = run_assets(args)
    family, arch = read_model(folder)
    size, on_cpu = args.rollout_tensor_parallel_size, accelerator.current().kind == "cpu"
    settings = VllmSettings(
        model_folder=str(folder),
        dtype=str(args.params_dtype).removeprefix("torch."),
        seed=args.seed,
        temperature=args.rollout_temperature,
        end_of_sequence_ids=end_of_sequence_ids,
        max_prompt_length=args.max_prompt_length,
        max_response_length=args.max_response_length,
        vocab_size=args.vocab_size,
        tensor_parallel_size=size,
        memory_share=args.rollout_memory_share,
        kv_cache_bytes=args.rollout_kv_cache_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
        max_sequences=args.rollout_max_sequences,
        enforce_eager=args.rollout_enforce_eager,
        prefix_caching=args.rollout_prefix_caching,
        sleep=args.rollout_sleep,
        time_limit=args.rollout_time_limit,
        progress=dist.get_rank() == 0,
    )
    source = WeightSource(model, family, arch, dtype=args.params_dtype, bucket_bytes=args.weight_sync_bucket_size)
    weights = EngineWeights(family, arch, tp_rank=dist.get_rank() % size, tp_size=size)
    engine = VllmEngine(settings, WatchedSource(source, weights))
    return ProvenEngine(engine, args, model, weight_bytes=source.size_bytes)


_BUILDERS = {"megatron": _megatron, "vllm": _vllm}
