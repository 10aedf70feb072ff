"""Table of the tensors of a Qwen3 with experts: dense Qwen3's outside the feed-forward layers, a router and experts.

An expert layer has its norm as a module of its own, also with Transformer Engine, which fuses that of a dense layer
with the projection behind it. Hugging Face calls both the same.
"""

from dataclasses import replace

from megatron_camopd.families import qwen3
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.placement import Shape
from megatron_camopd.families.qwen3_moe.config import Qwen3MoeArchitecture, dense_layers, expert_layers
from megatron_camopd.families.table import Partition, TensorTable, layer_entry


def _expert_width(arch: Architecture) -> int:
    assert isinstance(arch, Qwen3MoeArchitecture)
    return arch.expert_ffn_hidden_size


def _gate_up(arch: Architecture) -> tuple[Shape, ...]:
    return ((_expert_width(arch), arch.hidden_size),) * 2


_DENSE = "decoder.layers.mlp."  # what dense Qwen3 has in every layer, and a mixed model in its dense ones
_SHARED = [
    replace(entry, layers=dense_layers) if entry.key.startswith(_DENSE) else entry
    for entry in qwen3.FAMILY.table.entries
]
_AFTER = next(number for number, entry in enumerate(_SHARED) if entry.key == "decoder.final_layernorm.weight")
_EXPERTS = (
    layer_entry(
        "pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], Partition.REPLICATED,
        lambda arch: ((arch.hidden_size,),), layers=expert_layers,
    ),
    layer_entry(
        "mlp.router.weight", ["mlp.gate.weight"], Partition.REPLICATED,
        lambda arch: ((arch.num_experts, arch.hidden_size),), layers=expert_layers,
    ),
    layer_entry(
        "mlp.experts.experts.linear_fc1.weight",
        ["mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"], Partition.GATE_UP, _gate_up,
        te="mlp.experts.linear_fc1.weight{expert}", local="mlp.experts.local_experts.{expert}.linear_fc1.weight",
        layers=expert_layers,
    ),
    layer_entry(
        "mlp.experts.experts.linear_fc2.weight", ["mlp.experts.{expert}.down_proj.weight"], Partition.ROW,
        lambda arch: ((arch.hidden_size, _expert_width(arch)),),
        te="mlp.experts.linear_fc2.weight{expert}", local="mlp.experts.local_experts.{expert}.linear_fc2.weight",
        layers=expert_layers,
    ),
)  # fmt: skip

TABLE = TensorTable([*_SHARED[:_AFTER], *_EXPERTS, *_SHARED[_AFTER:]])
