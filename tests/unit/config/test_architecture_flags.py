"""Flags that would make another model than the checkpoint's: refused by name, unless they repeat what the model is.

That none is forgotten is held against Megatron itself: every flag that its model configuration reads is sorted here.
"""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.families.family import Family
from megatron_camopd.families.registry import FAMILIES
from tests.support.worlds import EXPERTS, SIZES, World, prepare, refusal

# Flags that Megatron's model configuration reads and that leave what the model computes alone: where it runs, in
# which precision, with which kernels, how memory is spared, how fresh weights would be drawn.
HARMLESS = re.compile(
    r"(tensor|pipeline|expert|sequence|context)_(model_)?(parallel|tensor_parallel).*|(gtp|tp_comm|fp8|fp4|inference)_.*"
    r"|.*(recompute|offload|cuda_graph|_wgrad|init_method|initialization|meta_device|_p2p).*"
    r"|fp16|bf16|.*_fp32|.*_fusion|.*_impl|.*dropout|seq_length|cp_comm_type|hierarchical_context_parallel_sizes"
    r"|max_seqlen_per_dp_cp_rank|overlap_(moe|dispatch)_.*|ep_overlap_.*|microbatch_group_size_per_vp_stage"
    r"|account_for_(embedding|loss)_in_pipeline_split|attention_backend|flash_(decode|attention_version)"
    r"|disable_bf16_reduced_precision_matmul|deterministic_mode"
    r"|use_fused_weighted_squared_relu|fused_residual_rmsnorm|use_transformer_engine_op_fuser|use_te_activation_func"
    r"|distribute_saved_activations|first_last_layers_bf16|num_layers_at_(start|end)_in_bf16|.*kitchen_attention.*"
    r"|qk_clip_(alpha|threshold)|dsa_kernel_backend|high_priority_a2a_comm_stream|use_grouped_gemm_for_.*"
    r"|clone_scatter_output_in_embedding|config_logger_dir|symmetric_ar_type|nccl_all_reduce_for_prefill"
    r"|use_mamba_mem_eff_path|mlp_chunks_for_.*|log_max_attention_logit|barrier_with_L1_time|test_mode"
    # How tokens travel to experts, and with which kernels experts compute.
    r"|moe_(enable_)?(deepep|flex|hybridep|ncclep|paged_stash|permute_fusion|router_fusion|router_padding_for)_?.*"
    r"|moe_(grouped_gemm|single_grouped_.*|layer_recompute|per_layer_logging|enable_routing_replay)"
    r"|moe_pad_experts_for_cuda_graph_inference"
)


def stated_arguments(family: Family) -> list[str]:
    """Names of the arguments that a small checkpoint of ``family`` states."""
    return family.stated_arguments(family.read_architecture({"model_type": family.model_type} | SIZES | EXPERTS))


def parser() -> argparse.ArgumentParser:
    """Megatron's parser as it is, without this project's flags and defaults."""
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def test_every_flag_of_megatrons_model_configuration_is_sorted() -> None:
    known = {action.dest for action in parser()._actions}
    from megatron.core.transformer import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_camopd.config.megatron_flags import OUTPUT_HEAD, UNSUPPORTED

    fields = {field.name for config in (TransformerConfig, GPTModelConfig) for field in dataclasses.fields(config)}
    for family in FAMILIES.values():
        stated = set(stated_arguments(family))
        sorted_out = stated | family.fixed_arguments.keys() | UNSUPPORTED.keys() | OUTPUT_HEAD.keys()
        left = {name for name in fields & known - sorted_out if not family.foreign_arguments.fullmatch(name)}
        assert {name for name in left if not HARMLESS.fullmatch(name)} == set(), family.model_type
        assert not stated & family.fixed_arguments.keys(), family.model_type


def test_every_flag_about_logits_and_their_loss_is_the_output_heads() -> None:
    from megatron_camopd.config.megatron_flags import OUTPUT_HEAD, REPLACED, UNSUPPORTED

    known = {action.dest for action in parser()._actions}
    assert OUTPUT_HEAD.keys() <= known
    assert not OUTPUT_HEAD.keys() & (REPLACED.keys() | UNSUPPORTED.keys())
    about_logits = {name for name in known if name.startswith("logits_") or "cross_entropy" in name}
    assert len(about_logits) > 10 and about_logits <= OUTPUT_HEAD.keys()


def test_fixed_values_are_what_megatron_builds_without_the_flag() -> None:
    made = parser()
    for family in FAMILIES.values():
        assert family.fixed_arguments.keys() <= {action.dest for action in made._actions}
        different = {name for name, value in family.fixed_arguments.items() if made.get_default(name) != value}
        assert different == {"rope_type"}  # None there: whatever the attention takes, which is rope


def test_checkpoints_state_every_argument_that_is_taken_from_them() -> None:
    decoder = {
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention",
            "num_query_groups", "kv_channels", "max_position_embeddings", "position_embedding_type",
            "add_position_embedding", "rotary_base", "rotary_percent", "rotary_interleaved", "normalization",
            "layernorm_epsilon", "qk_layernorm", "swiglu", "squared_relu", "add_bias_linear", "add_qkv_bias",
            "untie_embeddings_and_output_weights", "vocab_size", "make_vocab_size_divisible_by",
        }  # fmt: skip
    assert set(stated_arguments(FAMILIES["qwen3"])) == decoder
    for family in FAMILIES.values():
        assert set(stated_arguments(family)) >= decoder, family.model_type
        of_the_run = {"attention_dropout", "hidden_dropout", "padded_vocab_size", "tokenizer_type"}
        assert not of_the_run & set(stated_arguments(family))


@pytest.mark.parametrize(
    ("extra", "has"),
    [
        # stated by the checkpoint
        (["--rotary-base", "500"], "has 10000"),
        (["--rotary-percent", "0.5"], "has 1.0"),
        (["--norm-epsilon", "1e-2"], "has 1e-06"),
        (["--normalization", "LayerNorm"], "has RMSNorm"),
        (["--position-embedding-type", "learned_absolute"], "has rope"),
        (["--num-query-groups", "4"], "has 2"),
        (["--make-vocab-size-divisible-by", "64"], "has 128"),
        (["--rotary-interleaved"], "is made without it"),
        (["--add-qkv-bias"], "is made without it"),
        (["--squared-relu"], "is made without it"),
        (["--no-position-embedding"], "is made without it"),
        # fixed in a plain decoder
        (["--window-size", "2,0"], "has None"),
        (["--rotary-seq-len-interpolation-factor", "4"], "has None"),
        (["--no-rope-freq", "2"], "has None"),
        (["--softmax-type", "off-by-one"], "has vanilla"),
        (["--rope-type", "yarn"], "has rope"),
        (["--glu-linear-offset", "1.0"], "has 0.0"),
        (["--activation-func-clamp-value", "7.0"], "has None"),
        (["--experimental-attention-variant", "dsa"], "has None"),
        *[([switch], "is made without it") for switch in (
            "--use-rope-scaling", "--apply-query-key-layer-scaling", "--apply-residual-connection-post-layernorm",
            "--apply-layernorm-1p", "--attention-output-gate", "--qk-l2-norm", "--qk-clip", "--openai-gelu",
            "--quick-geglu", "--multi-latent-attention", "--use-mup", "--is-hybrid-model")],
        # models of other kinds
        (["--moe-router-topk", "4"], "is a dense Qwen3"),
        (["--mup-embedding-mult", "2.0"], "is a dense Qwen3"),
        (["--linear-attention-freq", "4"], "is a dense Qwen3"),
        (["--yarn-beta-fast", "2"], "is a dense Qwen3"),
    ],
)  # fmt: skip
def test_another_model_is_refused(extra: list[str], has: str, world: World, tmp_path: Path) -> None:
    line = refusal([*world.flags(save=tmp_path / "run"), *extra])
    assert line.startswith(extra[0]) and f": the model in --load {world.student} {has}; drop the flag" in line
    assert not (tmp_path / "run").exists()


def test_flags_may_repeat_what_the_model_is(world: World, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 8, "max_position_embeddings": 128, "rotary_base": 10000, "rotary_percent": 1.0,
        "norm_epsilon": 1e-6, "normalization": "RMSNorm", "position_embedding_type": "rope", "rope_type": "rope",
        "softmax_type": "vanilla",
    }  # fmt: skip
    switches = ["group-query-attention", "qk-layernorm", "swiglu", "disable-bias-linear",
                "untie-embeddings-and-output-weights", "use-rotary-position-embeddings"]  # fmt: skip
    args, _ = prepare([*world.flags(save=tmp_path / "run", **given), *(f"--{name}" for name in switches)])
    assert (args.layernorm_epsilon, args.rotary_base, args.qk_layernorm) == (1e-6, 10000, True)
