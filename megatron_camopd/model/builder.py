"""Construction of this rank's Qwen3 as Megatron's ``GPTModel``: the student with Megatron's DDP, a teacher without.

The model, its parallel layout and its mixed-precision wrapper are Megatron's own. Added here are the layer
specification for machines without Transformer Engine (its norms support sequence parallelism) and the
:class:`~megatron_camopd.model.output_head.OutputHead` of ``--output-head`` in place of the plain output layer.
"""

import copy
from argparse import Namespace

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.training import get_megatron_ddp_config

from megatron_camopd.model.materialized_head import MaterializedHead
from megatron_camopd.model.norm import RMSNorm
from megatron_camopd.model.output_head import HeadSettings, OutputHead, install_output_head

# Values of --output-head.
HEADS: dict[str, type[OutputHead]] = {"fused": OutputHead, "materialized": MaterializedHead}


def build_model(args: Namespace, *, trainable: bool) -> list[MegatronModule]:
    """Build this rank's model chunks, freshly initialised on the accelerator in the run's dtype.

    The list has one chunk, because the argument checks refuse interleaved pipelines. Load a checkpoint next.
    Megatron's parallel state must be initialised.

    Args:
        args: Checked Megatron and CaMOPD arguments.
        trainable: Wrap the chunks in Megatron's DDP with gradient buffers. Otherwise the parameters are frozen.
    """
    config = gpt_config_from_args(args)
    # Each micro-batch is padded to its own longest sample, so pipeline stages must exchange shapes. This is set
    # here because Megatron's argument validation would switch it off.
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    if args.transformer_impl == "local":
        config.transformer_layer_spec = local_layer_spec
    chunks = GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=get_megatron_ddp_config(args) if trainable else None,
        overlap_param_gather_with_optimizer_step=args.overlap_param_gather_with_optimizer_step,
        wrap_with_ddp=trainable,
        data_parallel_random_init=False,
    )
    head = HEADS[HeadSettings.of(args).output_head]
    for chunk in unwrap_model(chunks):
        if chunk.post_process:
            install_output_head(chunk, head)
    if not trainable:
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()
    return chunks


def local_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return Megatron's local Qwen3 layers (without Transformer Engine) with :class:`RMSNorm` as every norm."""
    layer: ModuleSpec = copy.deepcopy(get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"))
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    layers_here = get_num_layers_to_build(config.transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=RMSNorm)
