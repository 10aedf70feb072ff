"""Checks that no flag of Megatron is given that this trainer does not support or that contradicts the checkpoint.

The parameter ``given`` maps the name of each argument on the command line to the flag as written there.
"""

import re
import signal
from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

from megatron_camopd.errors import ConfigurationError

# Megatron's features that this trainer does not support: argument -> value when off.
UNSUPPORTED: dict[str, Any] = {
    "hybrid_context_parallel": False, "num_experts": None,
    "num_layers_per_virtual_pipeline_stage": None, "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None, "mtp_num_layers": None, "hybrid_layer_pattern": None, "spec": None,
    "fp8": None, "fp8_param_gather": False, "fp4": None, "fp4_param_gather": False, "te_precision_config_file": None,
    "async_save": False, "ckpt_format": "torch_dist", "use_megatron_fsdp": False, "use_torch_fsdp2": False,
    "train_samples": None, "rampup_batch_size": None, "step_batch_size_schedule": None,
    "calculate_per_token_loss": False, "checkpoint_activations": False, "fp32_residual_connection": False,
    "delay_wgrad_compute": False,
    "cuda_graph_impl": "none", "enable_cuda_graph": False, "external_cuda_graph": False, "skip_train": False,
    "perform_rl_step": False, "use_checkpoint_opt_param_scheduler": False, "use_mp_args_from_checkpoint_args": False,
    "padded_vocab_size": None, "pretrained_checkpoint": None, "override_ckpt_iteration": None,
    # Checkpoints without these would not resume exactly.
    "no_save_optim": None, "no_load_optim": None, "no_save_rng": None, "no_load_rng": None, "finetune": False,
    "non_persistent_save_interval": None, "non_persistent_ckpt_type": None,
}  # fmt: skip

# Why some of them are not, and what to use; the others are to be dropped.
_ONE_CHUNK = (
    "scoring, decoding and weight sync know one chunk a stage; use --pipeline-model-parallel-size, uneven with "
    "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
)
_INTERLEAVED = f"it hides little of a step in which rollouts dominate, and {_ONE_CHUNK}"
INSTEAD: dict[str, str] = {
    **dict.fromkeys(("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"), _INTERLEAVED),
    "pipeline_model_parallel_layout": f"a layout can give a stage several chunks, and {_ONE_CHUNK}",
}

# Flags that something else replaces here, and what replaces them.
_NEWEST = "a new run starts from the newest checkpoint in --load, a resumed one from the newest in --save"
_PROMPTS = "prompts come from --general-prompts and --domain-prompts, conversations (--stage sft) from --conversations"
_TOKENIZER = "the tokenizer and its chat template come with the checkpoint in --load"
REPLACED: dict[str, str] = {
    "ckpt_step": _NEWEST,
    **dict.fromkeys(
        ("data_path", "split", "train_data_path", "valid_data_path", "test_data_path", "data_args_path",
         "per_split_data_args_path", "per_dataset_sequences_path", "phase_transition_iterations", "mock_data",
         "fim_data", "sft", "reset_position_ids", "reset_attention_mask", "eod_mask_loss",
         "dataloader_inter_document_masking"),
        _PROMPTS,
    ),
    **dict.fromkeys(
        ("tokenizer_type", "tokenizer_model", "metadata_path", "special_tokens", "vocab_file", "merge_file",
         "vocab_extra_ids", "chat_template"),
        _TOKENIZER,
    ),
}  # fmt: skip

# Flags about logits, their loss and the output weight that the output head would contradict or ignore, and why.
_LOSS = "the output head computes the distillation loss itself, from log-probabilities in float32"
_WEIGHT_GRADIENT = "the output head finishes its weight's gradient in the forward pass; none is left to defer"
_LOGITS = "the output head keeps no logits, and teachers score the responses of every step"
OUTPUT_HEAD: dict[str, str] = {
    **dict.fromkeys(("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "fp16_lm_cross_entropy"), _LOSS),
    **dict.fromkeys(("defer_embedding_wgrad_compute", "wgrad_deferral_limit"), _WEIGHT_GRADIENT),
    **dict.fromkeys(
        ("logits_save_top_k", "logits_save_top_p", "logits_save_top_p_min_k", "logits_save_dir", "logits_save_dtype",
         "logits_load_dir", "logits_load_decode_threads", "logits_load_prefetch_factor",
         "logits_load_msc_prefetch_depth", "logits_load_kd_loss_alpha", "logits_load_ignore_errors"),
        _LOGITS,
    ),
    "fp8_output_proj": "the output head multiplies in the model's precision; gaps between log-probabilities need it",
    "reuse_grad_buf_for_mxfp8_param_ag": "the output head adds to the gradient buffer before the backward pass",
    "tensor_parallel_num_weight_shards":
        "the output head's vocabulary is sharded by --tensor-model-parallel-size alone",
    "pad_vocab_size": "the vocabulary is padded to equal shards; the output head leaves the padding out of the softmax",
    "batch_invariant_mode": "the output head's matrix products depend on how many tokens there are",
}  # fmt: skip


# Values of --dist-ckpt-strictness with which a checkpoint that lacks a tensor ends the run.
STRICT = ("assume_ok_unexpected", "raise_unexpected", "raise_all")


CONTEXT_TYPES = ("p2p", "all_gather")
"""Values of --cp-comm-type that keep the chunks of a sequence where packing puts them."""


def _check_context_parallelism(args: Namespace) -> None:
    """Check the way in which context-parallel ranks exchange keys and values."""
    given = [args.cp_comm_type] if isinstance(args.cp_comm_type, str) else args.cp_comm_type or []
    if len(given) > 1:
        raise ConfigurationError(f"--cp-comm-type {' '.join(given)}: give one type, which holds for all layers")
    wrong = [kind for kind in given if kind not in CONTEXT_TYPES]
    if wrong and args.context_parallel_size > 1:
        raise ConfigurationError(
            f"--cp-comm-type {wrong[0]}: not supported by CaMOPD training; must be one of {', '.join(CONTEXT_TYPES)}"
        )


def check_flags(args: Namespace, given: Mapping[str, str]) -> None:
    """Check that no flag is given that this trainer would ignore or handle wrongly.

    Raises:
        ConfigurationError: Names the flag and the reason.
    """
    for name, flag in given.items():
        value = getattr(args, name)
        reason = REPLACED.get(name) or OUTPUT_HEAD.get(name)
        if reason is not None:
            raise ConfigurationError(f"{_written(flag, value)}: not supported by CaMOPD training; {reason}")
        if name in UNSUPPORTED and value not in (UNSUPPORTED[name], None):
            instead = INSTEAD.get(name, "drop the flag")
            raise ConfigurationError(f"{_written(flag, value)}: not supported by CaMOPD training; {instead}")
    if args.exit_signal in (signal.SIGKILL, signal.SIGSTOP):
        raise ConfigurationError(f"--exit-signal {args.exit_signal.name}: cannot be handled; name another signal")
    _check_context_parallelism(args)
    strictness = args.dist_ckpt_strictness
    if strictness not in STRICT:
        raise ConfigurationError(
            f"--dist-ckpt-strictness {strictness}: would load a checkpoint in part and go on; it must be one of "
            f"{', '.join(STRICT)}"
        )


def check_same_model(
    args: Namespace,
    given: Mapping[str, str],
    saved: Namespace,
    source: str,
    *,
    title: str,
    stated: Collection[str],
    fixed: Mapping[str, Any],
    foreign: re.Pattern[str],
) -> None:
    """Check that no flag contradicts the model in the checkpoint.

    A flag that repeats a value of the model is accepted.

    Args:
        args: The arguments of the command line, before any was taken from the checkpoint.
        given: The flags that were given.
        saved: The arguments in the checkpoint.
        source: The flag that names the checkpoint, "load" or "save".
        title: The name of the model's family.
        stated: The arguments that a checkpoint of the family states.
        fixed: The other arguments that decide what a model computes, and their values in the family.
        foreign: Names of arguments that only shape models of other kinds.

    Raises:
        ConfigurationError: Names the flag, or the argument that the checkpoint lacks.
    """
    where = f"the model in --{source} {getattr(args, source)}"
    for name in stated:
        if getattr(saved, name, None) is None:
            raise ConfigurationError(f"--{source} {getattr(args, source)}: its arguments lack {name}; convert it again")
    for name, flag in given.items():
        value = getattr(args, name)
        if foreign.fullmatch(name):
            raise ConfigurationError(f"{_written(flag, value)}: {where} is a {title}; drop the flag")
        if name not in stated and name not in fixed:
            continue
        expected = getattr(saved, name) if name in stated else fixed[name]
        if value not in (expected, [expected]):  # Megatron's parser makes lists of some single values
            has = "is made without it" if isinstance(value, bool) else f"has {expected}"
            raise ConfigurationError(f"{_written(flag, value)}: {where} {has}; drop the flag")


def _written(flag: str, value: Any) -> str:
    """Return the flag with its value as on the command line, or a switch without one."""
    if isinstance(value, bool):
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
