"""The stream of weights to an engine: every Hugging Face tensor, bit for bit, on every rank of every layout."""

import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_camopd.checkpoint.export_hf import export_hf
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_checkpoint, write_prompts

OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "dp2": (2, OVERLAP),
}
MODELS = {"tied": True, "untied": False}
# 300 ids: at TP2 Megatron pads them to 512, so that the second rank holds 44 real rows and 212 phantom ones.
SIZES: dict[str, Any] = {"vocab_size": 300, "num_hidden_layers": 4}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# In bytes. The first: each tensor on its own. The last: one bucket a stage.
BUCKETS = (1, 12_000, 1 << 30)
FAULTY = "model.layers.2.mlp.down_proj.weight"  # of the last stage; Megatron has it as a tensor of its own


@functools.cache
def world(parent: Path, model: str) -> World:
    made = World(parent / model)
    made.root.mkdir()
    for seed, name in enumerate(("student", "teacher")):
        make_checkpoint(made.root / name, seed=seed, tie_word_embeddings=MODELS[model], **SIZES)
    for path in (made.general, made.domain):
        write_prompts(path, path.stem)
    return made


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weight-sync")


# What runs on each rank -------------------------------------------------------------------------------------------


def rank_main(line: list[str]) -> dict[str, Any]:
    import torch.distributed as dist

    from megatron_camopd.checkpoint.assets import assets_dir, read_model
    from megatron_camopd.rollout.weight_sync import WeightSource
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    family, arch = read_model(assets_dir(args.load))

    def source(bucket_bytes: int = 12_000, dtype: torch.dtype = torch.float32) -> WeightSource:
        return WeightSource(trainer.model, family, arch, dtype=dtype, bucket_bytes=bucket_bytes)

    found: dict[str, Any] = {"initial": [], "calls": []}
    for size in BUCKETS:
        with counted_collectives() as calls:
            found["initial"].append(one_pass(source(size)))
        found["calls"].append(calls)
    found["bf16"] = one_pass(source(dtype=torch.bfloat16))
    found["size_bytes"] = source().size_bytes, source(dtype=torch.bfloat16).size_bytes
    found["early"] = leave_early(source(), dist.get_rank() == 0)
    found["faults"] = plant_faults(source(1), trainer.model[0])
    found["probe"] = probe(trainer, dist.get_rank() == dist.get_world_size() - 1)
    trainer.train_step()
    trainer.step += 1
    trainer.save(trainer.state_dict())
    found["trained"] = one_pass(source())
    spell_like_transformer_engine(trainer.model[0])
    found["respelled"] = one_pass(source())
    return found


def one_pass(source: Any) -> dict[str, Any]:
    tensors = [(name, tensor.clone()) for name, tensor in source.tensors()]
    assert [name for name, _ in tensors] == source.names
    return {"tensors": tensors, "fingerprint": source.fingerprint, "version": source.version}


def counted_collectives() -> Any:
    """A context that yields the bytes moved by each broadcast and all-gather of the module."""
    from contextlib import contextmanager
    from unittest.mock import patch

    import torch.distributed as dist

    from megatron_camopd.rollout import weight_sync

    @contextmanager
    def counting() -> Iterator[dict[str, list[int]]]:
        moved: dict[str, list[int]] = {"broadcast": [], "all_gather_into_tensor": []}
        real = {name: getattr(dist, name) for name in moved}

        def record(name: str, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            moved[name].append(tensor.nbytes)
            return real[name](tensor, *arguments, **options)

        with (
            patch.object(weight_sync.dist, "broadcast", functools.partial(record, "broadcast")),
            patch.object(
                weight_sync.dist, "all_gather_into_tensor", functools.partial(record, "all_gather_into_tensor")
            ),
        ):
            yield moved

    return counting()


def leave_early(source: Any, leaver: bool) -> dict[str, Any]:
    """One rank stops in the middle, in every way there is; the others go on. Ends only if no rank waits for ever."""
    versions = []
    for way in ("break", "error", "never begun", "close"):
        tensors = source.tensors()
        if not leaver:
            assert len(list(tensors)) == len(source.names)
        elif way == "break":
            for _ in zip(range(3), tensors, strict=False):
                pass
            del tensors
        elif way == "error":
            with pytest.raises(OSError):
                try:
                    for _ in tensors:
                        raise OSError("the engine died")
                finally:
                    source.complete()
            assert list(tensors) == []
        elif way == "never begun":
            source.complete()
        else:
            next(tensors)
            tensors.close()
        versions.append(source.version)
    return {"versions": versions, "after": one_pass(source)}


def plant_faults(source: Any, model: Any) -> dict[str, str]:
    """Return what each rank is told about weights that one rank changed on the way, or that replicas disagree about."""
    from unittest.mock import patch

    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_camopd.rollout import weight_sync

    number = [item.names[0] for bucket in source._buckets for item in bucket].index(FAULTY)  # one tensor a bucket
    last = dist.get_rank() == dist.get_world_size() - 1
    told: dict[str, str] = {}

    def attempt(kind: str) -> None:
        with pytest.raises(weight_sync.StaleEngineError) as caught:
            for _ in source.tensors():
                pass
        told[kind] = str(caught.value)

    def faulty(name: str, damage: Any) -> Any:
        real, calls = getattr(dist, name), iter(range(1000))

        def transfer(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            real(tensor, *arguments, **options)
            if next(calls) == number:
                damage(tensor)

        return patch.object(weight_sync.dist, name, transfer)

    def flip_bit(tensor: Tensor) -> None:
        tensor[3] ^= 4 * last

    def swap_shards(tensor: Tensor) -> None:
        tensor.copy_(tensor.view(2, -1).flip(0).flatten())

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        with faulty("broadcast", flip_bit):
            attempt("broadcast")
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        for kind, damage in (("gather", flip_bit), ("swapped", swap_shards)):
            with faulty("all_gather_into_tensor", damage):
                attempt(kind)
    if dist.get_world_size() > parallel_state.get_pipeline_model_parallel_world_size():
        weight = next(
            parameter for name, parameter in model.named_parameters() if "layers.1.self_attention.q_layernorm" in name
        )
        before = weight.detach().clone()
        weight.data[1] += 1e-6 * last
        attempt("replicas")
        weight.data.copy_(before)
    list(source.tensors())  # sound again
    return told


def probe(trainer: Any, deviates: bool) -> dict[str, Any]:
    """The native engine under the probe, then with one rank's scores 2 nats away."""
    from megatron_camopd.errors import StaleEngineError
    from megatron_camopd.model.passes import PassSettings, score_responses
    from megatron_camopd.rollout.freshness import TOLERANCES, probe_engine, probe_prompts

    def score(rollout: Any) -> Tensor:
        return score_responses(PassSettings.of(trainer.args), trainer.model, rollout)

    generate = functools.partial(trainer.engine.generate, step=0)
    prompts, tolerance = probe_prompts(SIZES["vocab_size"], 20), TOLERANCES[torch.float32]
    result = probe_engine(generate, score, prompts, tolerance=tolerance)
    with pytest.raises(StaleEngineError) as caught:
        probe_engine(generate, lambda rollout: score(rollout) + 2.0 * deviates, prompts, tolerance=tolerance)
    return {"mean": result.mean, "max": result.max, "told": str(caught.value)}


def spell_like_transformer_engine(model: Any) -> None:
    """Move the norms' weights to where Transformer Engine's fused layers have them."""
    from megatron.core.utils import unwrap_model

    for layer in unwrap_model(model).decoder.layers:
        for norm, linear in (
            (layer.input_layernorm, layer.self_attention.linear_qkv),
            (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        ):
            linear.register_parameter("layer_norm_weight", norm.weight)
            del norm.weight


@functools.cache
def run_layout(parent: Path, model: str, layout: str) -> list[dict[str, Any]]:
    ranks, options = LAYOUTS[layout]
    made = world(parent, model)
    line = made.flags(save=made.root / f"run-{layout}", train_iters=1, lr=0.01, max_response_length=6, **options)
    return run_ranks(rank_main, ranks, line)


# The tests --------------------------------------------------------------------------------------------------------

each_model = pytest.mark.parametrize("model", MODELS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def check_tensors(found: dict[str, Any], expected: dict[str, Tensor], model: str) -> None:
    """Complete, in order, equal bit for bit."""
    names = [name for name, _ in found["tensors"]]
    if MODELS[model]:
        assert names.pop(1) == HEAD
        assert torch.equal(found["tensors"][1][1], expected[EMBEDDING])
    assert len(names) == 11 * 4 + 2 + (not MODELS[model])
    assert set(names) == set(expected) and names[0] == EMBEDDING and names[-1] in (HEAD, "model.norm.weight")
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    for name, tensor in found["tensors"]:
        reference = expected[EMBEDDING] if name == HEAD and MODELS[model] else expected[name]
        assert tensor.dtype == reference.dtype and torch.equal(tensor, reference), name


@each_layout
@each_model
def test_every_rank_gets_the_weights_of_the_folder(parent: Path, model: str, layout: str) -> None:
    expected = load_file(world(parent, model).root / "student-hf" / "model.safetensors")
    ranks = run_layout(parent, model, layout)
    for rank in ranks:
        for found in rank["initial"]:
            check_tensors(found, expected, model)
            assert found["version"] == 1
            assert found["fingerprint"] == ranks[0]["initial"][0]["fingerprint"]
        check_tensors(rank["bf16"], {name: tensor.bfloat16() for name, tensor in expected.items()}, model)
        elements = sum(tensor.numel() for tensor in expected.values())
        assert rank["size_bytes"] == (4 * elements, 2 * elements)


@each_layout
@each_model
def test_fingerprints_are_those_of_whole_tensors(parent: Path, model: str, layout: str) -> None:
    from megatron_camopd.rollout.checksum import checksum

    for rank in run_layout(parent, model, layout):
        for found in (rank["bf16"], rank["trained"]):
            assert found["fingerprint"] == {name: int(checksum(tensor)) for name, tensor in found["tensors"]}


@each_layout
@each_model
def test_weights_after_a_step_are_what_export_writes(parent: Path, tmp_path: Path, model: str, layout: str) -> None:
    ranks = run_layout(parent, model, layout)
    folder = export_hf(world(parent, model).root / f"run-{layout}", tmp_path / "exported")
    exported = load_file(folder / "model.safetensors")
    for rank in ranks:
        before = dict(rank["initial"][0]["tensors"])
        check_tensors(rank["trained"], exported, model)
        check_tensors(rank["respelled"], exported, model)
        for name, checksum in rank["trained"]["fingerprint"].items():
            assert not torch.equal(before[name], dict(rank["trained"]["tensors"])[name]), f"{name} was not trained"
            assert checksum != rank["initial"][0]["fingerprint"][name]


@each_layout
@each_model
def test_buckets_bound_what_is_moved_at_once(parent: Path, model: str, layout: str) -> None:
    tensors = 4 * 8 + (2 if MODELS[model] else 3)
    tp, pp = (LAYOUTS[layout][1].get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
    alone = {(512 if tp == 2 else 384) * 32 * 4, 96 * 32 * 4}  # embedding, output and fc1 exceed 12 kB by themselves
    for rank in run_layout(parent, model, layout):
        for size, calls in zip(BUCKETS, rank["calls"], strict=True):
            gathered = calls["all_gather_into_tensor"][:-1]  # the last one is of the checksums
            assert bool(calls["broadcast"]) == (pp > 1) and bool(gathered) == (tp > 1)
            if tp > 1 and pp > 1:
                assert gathered == [2 * count for count in calls["broadcast"]]
            moved = gathered or calls["broadcast"]
            if size == 12_000 and moved:
                assert pp < len(moved) < tensors
                assert {count for count in moved if count > 12_000} == alone
            elif moved:
                assert len(moved) == {1: tensors, 1 << 30: pp}[size]


@each_layout
@each_model
def test_a_rank_that_stops_early_leaves_nobody_waiting(parent: Path, model: str, layout: str) -> None:
    ranks = run_layout(parent, model, layout)
    for rank in ranks:
        assert rank["early"]["versions"] == [1, 2, 3, 4]
        after = rank["early"]["after"]
        assert after["fingerprint"] == rank["initial"][0]["fingerprint"]
        assert all(
            torch.equal(a[1], b[1]) for a, b in zip(after["tensors"], rank["initial"][0]["tensors"], strict=True)
        )


@each_layout
@each_model
def test_damage_on_the_way_is_named_on_every_rank(parent: Path, model: str, layout: str) -> None:
    planted = {
        "tp1": set(), "pp2": {"broadcast"}, "pp2-uneven": {"broadcast"}, "dp2": {"replicas"},
        "tp2": {"gather", "swapped", "replicas"}, "tp2-pp2": {"broadcast", "gather", "swapped", "replicas"},
    }  # fmt: skip
    for rank in run_layout(parent, model, layout):
        told = rank["faults"]
        assert told.keys() == planted[layout]
        for kind in told.keys() - {"replicas"}:
            assert told[kind] == f"weight sync: {FAULTY} did not arrive as it was sent; nothing was sampled with it"
        if "replicas" in told:
            assert "self_attn.q_norm.weight differs between ranks" in told["replicas"]


@each_layout
@each_model
def test_a_probe_that_fails_anywhere_fails_on_every_rank(parent: Path, model: str, layout: str) -> None:
    for rank in run_layout(parent, model, layout):
        assert 0.0 < rank["probe"]["mean"] <= rank["probe"]["max"] < 1e-5
        assert "by 2 nats on average and 2 at most" in rank["probe"]["told"]


# Memory -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made while it was on; ``peak`` since the last reset."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in before:
                    self.known[key] = weakref.finalize(storage, self._freed, key, storage.nbytes())
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


def memory_main(line: list[str], buckets: list[int]) -> dict[str, Any]:
    from megatron_camopd.checkpoint.assets import assets_dir, read_model
    from megatron_camopd.model.builder import build_model
    from megatron_camopd.rollout import checksum
    from megatron_camopd.rollout.weight_sync import WeightSource
    from megatron_camopd.runtime.startup import initialize_megatron
    from megatron_camopd.stages.arguments import parse_arguments

    args = parse_arguments(line)
    initialize_megatron(args)
    model = build_model(args, trainable=False)
    family, arch = read_model(assets_dir(args.load))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model[0].parameters()}
    checksum._BLOCK = 64
    peaks, kept = [], []
    for size in buckets:
        source = WeightSource(model, family, arch, dtype=torch.float32, bucket_bytes=size)
        views = []
        with LiveBytes() as memory:
            for name, tensor in source.tensors():
                views += [name] if tensor.untyped_storage().data_ptr() in parameters else []
            del tensor
        peaks.append(memory.peak)
        kept.append(memory.live)
    with LiveBytes() as memory:
        everything = list(source.tensors())
    assert len(everything) == len(source.names)
    return {"peaks": peaks, "kept": kept, "size": source.size_bytes, "all": memory.peak, "views": views}


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "tp2-pp2"])
def test_memory_is_a_small_multiple_of_the_bucket(tmp_path: Path, layout: str) -> None:
    made = World(tmp_path)
    for path in (made.student, made.teacher):
        make_checkpoint(path, tie_word_embeddings=False, num_hidden_layers=32)
    for path in (made.general, made.domain):
        write_prompts(path, path.stem)
    ranks, options = LAYOUTS[layout]
    small, large = 20_000, 200_000  # below and above the largest tensor
    largest = 512 * 32 * 4
    for rank in run_ranks(memory_main, ranks, made.flags(**options), [small, large]):
        assert rank["size"] > 1_000_000
        assert max(rank["kept"]) < 20_000  # gloo lets go of the last collective's tensor a little later
        if layout == "tp1":
            fused = [name for name in rank["views"] if any(f"{part}_proj" in name for part in "qkv")]
            assert len(rank["views"]) == 32 * 8 + 3 and not fused
            assert max(rank["peaks"]) < 40_000
        else:
            assert rank["peaks"][0] < 4 * largest and rank["peaks"][1] < 2.5 * large
            assert rank["all"] > rank["size"], "the counter sees what is held"
