"""``--rollout-engine vllm``: settings, their checks, and construction of the engine."""

import importlib.util
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from megatron_camopd.checkpoint.assets import read_model, run_assets
from megatron_camopd.config.byte_size import size_argument
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.config.settings import Range, Settings, at_least, setting, switch
from megatron_camopd.data.chat import PromptSettings
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.model.passes import PassSettings
from megatron_camopd.rollout.engine import RolloutEngine
from megatron_camopd.rollout.freshness import VLLM_VOCABULARY_MULTIPLE
from megatron_camopd.runtime import accelerator

_CPU_KV_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class VllmEngineSettings(Settings):
    """CaMOPD rollouts by vLLM: used only with --rollout-engine vllm."""

    rollout_tensor_parallel_size: int = setting(1, within=at_least(1), metavar="N")
    """processes of one engine, independent of the training layout; divides the number of all processes"""

    rollout_max_sequences: int = setting(256, within=at_least(1))
    """sequences one engine decodes at once"""

    rollout_memory_share: float = setting(
        0.5, within=Range(0, 1, open_low=True, open_high=True, words="must be between 0 and 1")
    )
    """share of a GPU's memory that an engine may take, weights included"""

    rollout_kv_cache_bytes: int | None = setting(None, metavar="SIZE", parse=size_argument)
    """KV cache of a process (default: on a GPU what --rollout-memory-share leaves, else 512MiB)"""

    rollout_enforce_eager: bool = setting(False)
    """run vLLM without CUDA graphs"""

    rollout_prefix_caching: bool = switch(True)
    """compute only once a prefix that several prompts share"""

    rollout_sleep: bool = switch(True)
    """free the engine's GPU memory while training"""

    rollout_time_limit: float = setting(0.0, within=at_least(0), metavar="SECONDS")
    """time limit for the rollouts of a step; beyond it the run saves and stops (default: none)"""

    weight_sync_bucket_size: int = setting(512 * 2**20, metavar="SIZE", parse=size_argument)
    """weights gathered at once on their way to the engine (default: 512MiB)"""

    rollout_probe_interval: int = setting(20, within=at_least(0), metavar="STEPS")
    """steps between two probes, which compare the engine's log-probabilities with the trainer's; the first step always
    has one, with 0 no other step"""

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check that vLLM is installed, and that the engines can share the processes evenly.

        Raises:
            ConfigurationError: vLLM is missing, or a value is out of range.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigurationError("--rollout-engine vllm: vllm is not installed; run `make setup EXTRAS=vllm`")
        super().check(args, given)
        if args.world_size % args.rollout_tensor_parallel_size:
            raise ConfigurationError(
                f"--rollout-tensor-parallel-size {args.rollout_tensor_parallel_size}: must divide the "
                f"{args.world_size} processes"
            )

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check that vLLM can take the model and divide it among the ranks of one engine.

        Raises:
            ConfigurationError: The model has experts, or ``--rollout-tensor-parallel-size`` does not fit its sizes.
        """
        if args.num_experts:
            raise ConfigurationError(
                "--rollout-engine vllm: the weights of experts cannot be sent to it yet; use --rollout-engine megatron"
            )
        size, groups = args.rollout_tensor_parallel_size, args.num_query_groups
        vocabulary = -(-args.vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
        if (
            args.num_attention_heads % size
            or args.ffn_hidden_size % size
            or vocabulary % size
            or (groups % size and size % groups)
        ):
            raise ConfigurationError(
                f"--rollout-tensor-parallel-size {size}: must divide the {args.num_attention_heads} attention heads, "
                f"{args.ffn_hidden_size} feed-forward columns and {vocabulary} vocabulary rows, and divide the "
                f"{groups} query groups or be a multiple of them"
            )


def build(args: Namespace, model: Sequence[MegatronModule], end_of_sequence_ids: Sequence[int]) -> RolloutEngine:
    """Build the vLLM engine, with the checks that its weights are the student's; collective over the world."""
    # Imported here, since only runs with this engine need these modules.
    from megatron_camopd.rollout.freshness import TOLERANCES, EngineWeights
    from megatron_camopd.rollout.verified_engine import VerifiedEngine
    from megatron_camopd.rollout.vllm_engine import VllmEngine
    from megatron_camopd.rollout.vllm_settings import VllmSettings
    from megatron_camopd.rollout.weight_sync import WeightSource

    flags, sampling, prompts = VllmEngineSettings.of(args), SamplingSettings.of(args), PromptSettings.of(args)
    folder = run_assets(args)
    family, arch = read_model(folder)
    size, on_cpu = flags.rollout_tensor_parallel_size, accelerator.current().kind == "cpu"
    settings = VllmSettings(
        model_folder=str(folder),
        dtype=str(args.params_dtype).removeprefix("torch."),
        seed=args.seed,
        temperature=sampling.rollout_temperature,
        end_of_sequence_ids=end_of_sequence_ids,
        max_prompt_length=prompts.max_prompt_length,
        max_response_length=sampling.max_response_length,
        vocab_size=args.vocab_size,
        tensor_parallel_size=size,
        memory_share=flags.rollout_memory_share,
        kv_cache_bytes=flags.rollout_kv_cache_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
        max_sequences=flags.rollout_max_sequences,
        enforce_eager=flags.rollout_enforce_eager,
        prefix_caching=flags.rollout_prefix_caching,
        sleep=flags.rollout_sleep,
        time_limit=flags.rollout_time_limit,
        progress=dist.get_rank() == 0,
    )
    source = WeightSource(
        model,
        family,
        arch,
        dtype=args.params_dtype,
        bucket_bytes=flags.weight_sync_bucket_size,
        recorder=EngineWeights(family, arch, tp_rank=dist.get_rank() % size, tp_size=size),
    )
    return VerifiedEngine(
        VllmEngine(settings, source),
        model,
        PassSettings.of(args),
        probe_interval=flags.rollout_probe_interval,
        tolerance=TOLERANCES[args.params_dtype],
        weight_bytes=source.size_bytes,
    )
