"""Build a model as Megatron's ``GPTModel`` for this rank: the student with Megatron's DDP, a teacher without.

The model, its parallel layout and its mixed-precision wrapper are Megatron's own; what is added is the family's
layer specification for machines without Transformer Engine and the
:class:`~megatron_camopd.model.output_head.OutputHead` of ``--output-head`` in place of the plain output layer.
"""

from argparse import Namespace
from collections.abc import Callable

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.training import get_megatron_ddp_config

from megatron_camopd.checkpoint.assets import read_model, run_assets
from megatron_camopd.model.attention import PlainAttention
from megatron_camopd.model.materialized_head import MaterializedHead
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
    # Micro-batches have different lengths, so pipeline stages must exchange shapes. This is set here because Megatron's
    # argument validation would switch it off.
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    if args.transformer_impl == "local":
        config.transformer_layer_spec = _local_layer_spec(args)
    chunks: list[MegatronModule] = GPTModelBuilder(config).build_distributed_models(
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


def _local_layer_spec(args: Namespace) -> Callable[..., TransformerBlockSubmodules]:
    """The layers of the family of ``args``, as Megatron's builder asks for them."""
    family, _ = read_model(run_assets(args))

    def specification(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        layers = family.local_layers(config.transformer, vp_stage)
        for layer in layers.layer_specs:  # Megatron's own takes neither packed sequences nor context parallelism
            layer.submodules.self_attention.submodules.core_attention = PlainAttention
        return layers

    return specification
