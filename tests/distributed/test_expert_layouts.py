"""Models with experts on parallel layouts: weights, logits, keys in a checkpoint, weights sent to an engine.

Runs refuse expert parallelism so far; checkpoints must fit it already.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_camopd.checkpoint import assets
from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.torch_dist import TorchDistReader
from tests.support.expert_models import Models, assert_identical, loaded_model, stored
from tests.support.processes import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2-EP2-ETP1": (
        2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "PP2-EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2-EP2-ETP2": (
        4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def expected_shard(tensors: dict[str, Tensor], layer: int, name: str) -> Tensor | None:
    """Cut by hand what this rank holds of a layer's parameter ``name``; None: of attention, which others test."""
    from megatron.core import parallel_state

    prefix = f"model.layers.{layer}."
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if "local_experts" in name:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
        here = 8 // parallel_state.get_expert_model_parallel_world_size()
        expert = int(name.split(".")[3]) + here * parallel_state.get_expert_model_parallel_rank()
        mlp = f"{prefix}mlp.experts.{expert}."
    else:
        mlp = f"{prefix}mlp."
    if name.endswith("linear_fc1.weight"):
        return torch.cat([tensors[f"{mlp}{part}_proj.weight"].chunk(size)[rank] for part in ("gate", "up")])
    if name.endswith("linear_fc2.weight"):
        return tensors[f"{mlp}down_proj.weight"].chunk(size, dim=1)[rank]
    if name == "mlp.router.weight":
        return tensors[f"{mlp}gate.weight"]
    if name == "pre_mlp_layernorm.weight":
        return tensors[f"{prefix}post_attention_layernorm.weight"]
    assert name.startswith(("self_attention.", "input_layernorm.")), name
    return None


def wrong_parameters(source: str, checkpoint: str, sizes: dict[str, int], saved: str) -> list[str]:
    """Load on this layout; return the parameters that are not what Hugging Face's tensors say, then save."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from megatron.core.utils import unwrap_model

    model = unwrap_model(loaded_model(checkpoint, sizes)[1])
    tensors, first = stored(Path(source)), get_transformer_layer_offset(model.config)
    wrong, seen = [], 0
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder.layers."):
            continue
        _, _, layer, rest = name.split(".", 3)
        expected = expected_shard(tensors, first + int(layer), rest)
        if expected is not None:
            seen += 1
            wrong += [] if torch.equal(parameter, expected) else [name]
    assert seen > 0
    if torch.distributed.get_rank() == 0:
        Path(saved).mkdir(parents=True)
    torch.distributed.barrier()
    state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    dist_checkpointing.save(state | {"iteration": 10}, saved)
    return wrong


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*((layout, "top2-fp32") for layout in LAYOUTS), ("TP2-EP2-ETP1", "mixed-fp32"), ("PP2-EP2", "mixed-fp32")],
)
def test_a_checkpoint_loads_at_any_layout_and_comes_back(
    layout: str, variant: str, models: Models, tmp_path: Path
) -> None:
    """A checkpoint saved at that layout, in Megatron's own way, is exported bit for bit."""
    ranks, sizes = LAYOUTS[layout]
    run = tmp_path / "run"
    source, checkpoint = str(models.folder(variant)), str(models.checkpoint(variant))
    found = run_ranks(wrong_parameters, ranks, source, checkpoint, sizes, str(run / "iter_0000010"))
    assert found == [[]] * ranks
    (run / TRACKER).write_text("10")
    assets.copy_assets(assets.assets_dir(models.checkpoint(variant)), assets.assets_dir(run))
    assert_identical(stored(export_hf(run, tmp_path / "out")), stored(models.folder(variant)))


def logits_difference_of_layout(source: str, checkpoint: str, sizes: dict[str, int]) -> float:
    """Each rank computes tokens of its own, so that experts receive unequal numbers of them from each."""
    from transformers import Qwen3MoeForCausalLM

    args, model = loaded_model(checkpoint, sizes)
    length = 24 + 9 * torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    tokens = torch.randint(args.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        logits = model(tokens, torch.arange(length).expand(2, -1), None)[..., : args.vocab_size]
        expected = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(tokens).logits
    assert expected.abs().max() > 1
    return float((logits - expected).abs().max())


@pytest.mark.parametrize("variant", ["top4-fp32", "mixed-fp32"])
def test_logits_with_experts_on_several_ranks(variant: str, models: Models) -> None:
    sizes = {"expert_model_parallel_size": 2}
    found = run_ranks(
        logits_difference_of_layout, 2, str(models.folder(variant)), str(models.checkpoint(variant)), sizes
    )
    assert max(found) < 2e-5


def keys_of_model(checkpoint: str) -> list[dict[str, tuple[int, ...]]]:
    _, model = loaded_model(checkpoint, {})
    tensors, objects = {}, {}
    for entry in model.sharded_state_dict(metadata={"singleton_local_shards": False}).values():
        for part in entry.build() if hasattr(entry, "build") else [entry]:
            if hasattr(part, "unique_key"):
                objects[part.unique_key] = ()
            else:
                tensors[part.key] = tuple(part.global_shape)
    return [tensors, objects]


@pytest.mark.parametrize("variant", ["top2-fp32", "mixed-fp32"])
def test_the_checkpoint_has_the_keys_of_a_real_model(variant: str, models: Models) -> None:
    checkpoint = models.checkpoint(variant)
    ((tensors, objects),) = run_ranks(keys_of_model, 1, str(checkpoint))
    reader = TorchDistReader(checkpoint / "release")
    vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert {key: shape for key, shape in reader.shapes.items() if key not in vocabulary} == {
        key: shape for key, shape in tensors.items() if key not in vocabulary
    }
    assert objects and objects.keys() <= reader._metadata.state_dict_metadata.keys()


def sent_weights(source: str, checkpoint: str, sizes: dict[str, int]) -> bool:
    """Whether a weight sync sends exactly the tensors of Hugging Face's folder."""
    from megatron_camopd.rollout.weight_sync import WeightSource

    args, model = loaded_model(checkpoint, sizes)
    family, arch = assets.read_model(assets.run_assets(args))
    weights = WeightSource([model], family, arch, dtype=torch.float32, bucket_bytes=20_000)
    sent = {name: tensor.clone() for name, tensor in weights.tensors()}
    assert_identical(sent, stored(Path(source)))
    return True


@pytest.mark.parametrize("variant", ["top2-fp32", "mixed-fp32"])
@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_an_engine_is_sent_every_expert(layout: str, variant: str, models: Models) -> None:
    ranks, sizes = LAYOUTS[layout]
    assert (
        run_ranks(sent_weights, ranks, str(models.folder(variant)), str(models.checkpoint(variant)), sizes)
        == [True] * ranks
    )
