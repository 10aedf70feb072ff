"""Gradient diagnostics on every parallel layout against autograd in float64, and training that does not notice them.

The reference takes every sample's gradient from Hugging Face's Qwen3, made float64 throughout (its norms, its softmax
and its rotary angles are float32 even in a float64 model), as one long vector, and computes norms, coherence, inner
product and cosine from the vectors as they are defined.

Tolerances. The model under test computes in float32. What that costs is the same at every layout, a few 1e-7 of a
norm; see RELATIVE.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from megatron_camopd.batch import RolloutBatch, ScoredBatch
from tests.support.processes import run_ranks
from tests.support.worlds import World, make_checkpoint, write_prompts

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2 | {"sequence_parallel": True}),
    "pp2": (2, PP2 | {"overlap_grad_reduce": True}),
    "dp2": (2, {}),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True}),
}
# 300 ids: at TP2 they are cut into 256 and 44, with phantom columns behind.
SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "initializer_range": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False, "hidden_size": 40, "head_dim": 16, "num_attention_heads": 6},
}
TEMPERATURES = {"tied": 1.0, "untied": 0.7}
RELATIVE = 1e-6
PROMPTS, RESPONSES = (3, 9, 5, 12, 3, 9, 5, 12), (16, 12, 19, 10, 18, 15, 14, 17)
SELECTED = (0, 1, 4, 5)
STEP, INTERVAL = 6, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A measurement: how many samples, the composition of the batch (without domain samples: a probe)."""

    samples: int = 8
    general: int = 8
    floor: float | None = None
    own_teacher: bool = False  # the probe's teacher is the student itself


CASES = {
    "every sample": Case(),
    "half of the samples": Case(samples=4),
    "both branches": Case(general=4, floor=-0.4),
    "the student is the domain teacher": Case(own_teacher=True),
}
LOSS_SCALE = "every sample, loss scale 1024"


# The reference ----------------------------------------------------------------------------------------------------


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Hugging Face's Qwen3 without its detours through float32."""

    def norm(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self: Any, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        theta, size = self.config.rope_parameters["rope_theta"], self.config.head_dim
        frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        length = query.shape[2]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(later, -torch.inf).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm)
        patch.setattr(modeling_qwen3.Qwen3RotaryEmbedding, "forward", rotary)
        patch.setattr(modeling_qwen3, "eager_attention_forward", attention)
        yield


def logprobs_of(network: Any, rollout: RolloutBatch, row: int, temperature: float) -> Tensor:
    """[L] float64 with graph: log-probabilities of one sample's response."""
    prompt, response = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
    tokens = rollout.tokens[row, : prompt + response]
    logits = network(tokens[None]).logits[0, prompt - 1 : -1] / temperature
    assert logits.dtype == torch.float64
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[prompt:, None]).squeeze(1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A folder with checkpoints and ``batches.pt``, batch and probe, and a float64 network.

    The log-probabilities of the samples are in that network's graph.
    """

    root: Path
    batches: dict[str, ScoredBatch]
    network: Any


@functools.cache
def problem(parent: Path, model: str) -> Problem:
    """Random tokens, scored: the student by Hugging Face in float64, teacher and rollout engine nearby.

    The second half of the batch has the prompts of the first and a teacher that wants much the same; the probe's wants
    much the opposite. So gradients point in related directions, and cosines have the digits that are compared.
    """
    root = parent / model
    root.mkdir()
    make_checkpoint(root / "student", seed=3, **(SIZES | MODELS[model]))
    write_prompts(root / "general.jsonl", "general")
    write_prompts(root / "domain.jsonl", "domain")
    network = Qwen3ForCausalLM.from_pretrained(root / "student-hf", dtype=torch.float64, attn_implementation="eager")
    generator = torch.Generator().manual_seed(12)
    rows, width = len(PROMPTS), max(RESPONSES)
    rollout = RolloutBatch(
        indices=torch.arange(rows),
        tokens=torch.randint(300, (rows // 2, 32), generator=generator).repeat(2, 1),
        prompt_lengths=torch.tensor(PROMPTS),
        response_lengths=torch.tensor(RESPONSES),
        rollout_logprobs=torch.zeros(rows, width),
        truncated=torch.zeros(rows, dtype=torch.bool),
    )
    with float64_throughout(), torch.no_grad():
        of_rows = [logprobs_of(network, rollout, row, TEMPERATURES[model]) for row in range(rows)]
    student = torch.stack([torch.nn.functional.pad(of_row, (0, width - len(of_row))) for of_row in of_rows])
    mask = rollout.response_mask
    engine = torch.randn(rows // 2, width, generator=generator).repeat(2, 1)
    rollout.rollout_logprobs.copy_(student + engine * mask)
    wish = 4.0 * torch.randn(rows // 2, width, generator=generator).repeat(2, 1)
    advantages = {
        "batch": wish + torch.randn(rows, width, generator=generator),
        "probe": torch.randn(rows, width, generator=generator) - wish,
    }
    batches = {
        name: ScoredBatch(
            rollout, torch.zeros(rows, dtype=torch.int64), (student + advantage * mask).float(), student.float()
        )
        for name, advantage in advantages.items()
    }
    turned = batches["probe"].take((torch.arange(rows) + 3) % rows)
    batches["probe"] = dataclasses.replace(
        turned, rollout=dataclasses.replace(turned.rollout, indices=torch.arange(rows) + rows)
    )
    saved = {
        name: {"rollout": vars(batch.rollout), "teacher": batch.teacher_logprobs, "student": batch.student_logprobs}
        for name, batch in batches.items()
    }
    torch.save(saved, root / "batches.pt")
    return Problem(root, batches, network)


@functools.cache
def sample_gradients(parent: Path, model: str, name: str, floor: float | None) -> Tensor:
    """[N, parameters] float64: the gradient of each sample's term of Eq. 2, from the formulas."""
    made = problem(parent, model)
    batch, parameters = made.batches[name], list(made.network.parameters())
    gradients = []
    dropped = below_floor = 0
    for row, length in enumerate(batch.rollout.response_lengths.tolist()):
        with float64_throughout():
            student = logprobs_of(made.network, batch.rollout, row, TEMPERATURES[model])
        frozen = student.detach()
        ratio = (frozen - batch.rollout.rollout_logprobs[row, :length].double()).exp()
        weight = torch.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0.0)
        advantage = batch.teacher_logprobs[row, :length].double() - frozen
        dropped += int((weight == 0).sum())
        if floor is not None:
            below_floor += int((advantage < floor).sum())
            advantage = advantage.clamp(min=floor)
        loss = -(weight * advantage * student).sum() / length
        parts = torch.autograd.grad(loss, parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    assert dropped > 3 and (floor is None or below_floor > 3), "the cases do not contain what they are about"
    return torch.stack(gradients)


def expected_numbers(parent: Path, model: str, case: Case) -> dict[str, Any]:
    gradients = sample_gradients(parent, model, "batch", case.floor)
    rows = [number * 8 // case.samples for number in range(case.samples)]
    chosen = [row for row in rows if row in SELECTED]
    norms = gradients.norm(dim=1)

    def coherence(of: list[int]) -> float:
        return float(gradients[of].sum(dim=0).norm() / norms[of].sum())

    general = gradients[[row for row in rows if row < case.general]].mean(dim=0)
    if case.general < 8:
        domain = gradients[[row for row in rows if row >= case.general]].mean(dim=0)
    else:
        domain = sample_gradients(parent, model, "probe", case.floor)[: case.samples].mean(dim=0)
    if case.own_teacher:
        domain = torch.zeros_like(general)
    full, selected = coherence(rows), coherence(chosen)
    return {
        "coherence_full": full,
        "coherence_selected": selected,
        "gradient_coherence_gain": (selected - full) / full * 100,
        "sample_grad_norms": norms[rows].tolist(),
        "sample_grad_norm_mean": float(norms[rows].mean()),
        "sample_grad_norm_selected_mean": float(norms[chosen].mean()),
        "branch_dot_product": float(general @ domain),
        "branch_cosine": float(general @ domain / (general.norm() * domain.norm())),
        "general_grad_norm": float(general.norm()),
        "domain_grad_norm": float(domain.norm()),
    }


# What runs on each rank -------------------------------------------------------------------------------------------


class ProbeStream:
    """Stands in for a prompt stream; remembers where it was put."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def seek(self, cursor: int) -> None:
        self.asked.append(cursor)

    def next(self, count: int) -> list[Any]:
        self.asked.append(count)
        return [None] * count


def rank_main(line: list[str], batch_file: str) -> dict[str, Any]:
    """Every case's numbers; where the probe's stream was put; what was found changed after measuring."""
    from megatron.core.utils import get_model_config

    from megatron_camopd.diagnostics.gradients import DiagnosticsSettings, GradientDiagnostics
    from megatron_camopd.objective.method import TrainingWeights
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.distill.plan import plan_distillation
    from megatron_camopd.stages.distill.runner import DistillRunner

    args = parse_arguments(line)
    trainer = DistillRunner(args, plan_distillation(args))
    batch, probe = (
        ScoredBatch(
            RolloutBatch(**saved["rollout"]), torch.ones(8, dtype=torch.int64), saved["teacher"], saved["student"]
        )
        for saved in torch.load(batch_file).values()
    )
    results: dict[str, Any] = {"asked": [], "changed": []}
    for name in (*CASES, LOSS_SCALE):
        case = CASES[name.split(", loss")[0]]
        scale = torch.tensor([1024.0 if name == LOSS_SCALE else 1.0])
        get_model_config(trainer.model[0]).grad_scale_func = lambda loss, scale=scale: scale * loss
        streams = {branch: ProbeStream() for branch in (0, 1)}

        def collect(prompts: Any, case: Case = case) -> ScoredBatch:
            assert prompts.branches == [1] * case.samples
            assert prompts.indices == [8 + place for place in range(case.samples)]
            found = probe.take(torch.arange(len(prompts)))
            torch.rand(3)  # as sampling would
            return dataclasses.replace(found, teacher_logprobs=found.student_logprobs) if case.own_teacher else found

        batch = dataclasses.replace(batch, branches=(torch.arange(len(batch)) >= case.general).long())
        selected = torch.tensor([row in SELECTED for row in range(len(batch))])
        weights = TrainingWeights(torch.zeros_like(batch.student_logprobs), selected, case.floor)
        settings = DiagnosticsSettings(
            gradient_diagnostics_interval=INTERVAL, gradient_diagnostics_samples=case.samples
        )
        diagnostics = GradientDiagnostics(
            settings,
            trainer.passes,
            trainer.model,
            trainer.plan.table.branches,
            streams,  # type: ignore[arg-type]
            collect,
            first_probe_index=args.global_batch_size,
        )
        assert diagnostics.measure(STEP + 1, batch, weights) == {}
        next(trainer.model[0].parameters()).grad_added_to_main_grad = True  # as the last step may have left it
        for parameter in trainer.model[0].parameters():  # as Megatron's float32 optimizer leaves it after a step
            parameter.grad = parameter.main_grad
        before = traces(trainer)
        results[name] = diagnostics.measure(STEP, batch, weights)
        results["changed"] += [f"{name}: {trace}" for trace in changed(before, traces(trainer))]
        results["asked"].append([streams[branch].asked for branch in (0, 1)])
    return results


def traces(trainer: Any) -> dict[str, Any]:
    """Return what training would notice: random states, weights, gradients, flags, the configuration's hooks."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.utils import get_model_config

    (chunk,) = trainer.model
    parameters = dict(chunk.named_parameters())
    config = get_model_config(chunk)
    buckets = chunk.bucket_groups
    return {
        "random state": torch.get_rng_state(),
        **{f"tracker {name}": state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
        **{name: parameter.detach().clone() for name, parameter in parameters.items()},
        "grad": [name for name, parameter in parameters.items() if parameter.grad is not None],
        "gradients": torch.cat([parameter.main_grad.flatten() for parameter in parameters.values()]),
        "flags": [parameter.grad_added_to_main_grad for parameter in parameters.values()],
        "hooks": [config.finalize_model_grads_func, config.no_sync_func, config.grad_sync_func],
        "buckets": [(b.is_last_microbatch, b.is_first_batch, len(b.per_param_grad_ready_counts)) for b in buckets],
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) else one == other

    return [name for name in before | after if not same(before[name], after[name])]


@functools.cache
def run_layout(parent: Path, model: str, layout: str) -> list[dict[str, Any]]:
    """All ranks' results of one layout; each runs once."""
    root = problem(parent, model).root
    ranks, changes = LAYOUTS[layout]
    line = World(root).flags(
        save=root / f"run-{layout}",
        general_teacher_load=root / "student",
        global_batch_size=8,
        micro_batch_size=2,
        rollout_temperature=TEMPERATURES[model],
        **changes,
    )
    return run_ranks(rank_main, ranks, line, str(root / "batches.pt"))


# The tests --------------------------------------------------------------------------------------------------------

each_model = pytest.mark.parametrize("model", MODELS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnostics")


@each_layout
@each_model
def test_numbers_are_those_of_the_definitions(parent: Path, model: str, layout: str) -> None:
    for rank in run_layout(parent, model, layout):
        for name, case in CASES.items():
            expected = expected_numbers(parent, model, case)
            assert expected.keys() <= rank[name].keys()
            for key, value in expected.items():
                assert rank[name][key] == pytest.approx(value, rel=RELATIVE, abs=0, nan_ok=True), (name, key)


@each_model
def test_the_cases_are_worth_comparing(parent: Path, model: str) -> None:
    """Values far from each other and from zero; a gain or a cosine near zero would have no digits in float32."""
    for case in CASES.values():
        found = expected_numbers(parent, model, case)
        assert 0.1 < found["coherence_full"] < found["coherence_selected"] < 0.99
        assert found["gradient_coherence_gain"] > 10
        assert max(found["sample_grad_norms"]) > 1.3 * min(found["sample_grad_norms"])
        if case.own_teacher:
            assert found["branch_dot_product"] == found["domain_grad_norm"] == 0 and math.isnan(found["branch_cosine"])
        else:
            assert abs(found["branch_cosine"]) > 0.3 and found["general_grad_norm"] != found["domain_grad_norm"]


@each_layout
@each_model
def test_ranks_agree_and_the_loss_scale_leaves_no_trace(parent: Path, model: str, layout: str) -> None:
    ranks = run_layout(parent, model, layout)
    for rank in ranks:
        assert rank[LOSS_SCALE] == rank["every sample"]  # a power of two: not a bit
        for name in CASES:
            found, first = rank[name], ranks[0][name]
            assert found.keys() == first.keys()
            memory = {"diagnostics_memory_gib"}  # of this rank's shard
            different = {key for key in found.keys() - memory if found[key] != first[key] and found[key] == found[key]}
            assert not different, name


@each_layout
@each_model
def test_nothing_that_training_sees_has_changed(parent: Path, model: str, layout: str) -> None:
    for rank in run_layout(parent, model, layout):
        assert rank["changed"] == []


@each_model
def test_probes_come_from_their_own_stream_at_the_step_s_place(parent: Path, model: str) -> None:
    """[general, domain] per case: where it was put, how many prompts were drawn; the third case needs no probe."""
    (rank,) = run_layout(parent, model, "tp1")
    third = STEP // INTERVAL
    assert rank["asked"] == [[[], [third * 8, 8]], [[], [third * 4, 4]], [[], []], [[], [third * 8, 8]], [[], [24, 8]]]


def test_gaps_are_spread_as_their_scores_say(parent: Path) -> None:
    """One curve in a step of one branch, one for each branch in a step of both."""
    batch = problem(parent, "untied").batches["batch"]
    (rank,) = run_layout(parent, "untied", "tp1")
    gap = (batch.teacher_logprobs.double() - batch.student_logprobs.double()) * batch.response_mask
    scores = gap.abs().sum(dim=1) / batch.rollout.response_lengths
    largest = float(scores.max() / scores.sum())
    assert rank["every sample"]["gap_lorenz"][::20] == [0.0, 1.0]
    assert rank["every sample"]["gap_lorenz"][1] == pytest.approx(largest * 0.05 * 8)
    both = rank["both branches"]
    assert {key for key in both if key.startswith("gap_")} == {
        "gap_lorenz_general", "gap_gini_general", "gap_lorenz_domain", "gap_gini_domain",
    }  # fmt: skip
    positive = gap[4:].clamp(min=0).sum(dim=1) / batch.rollout.response_lengths[4:]
    assert both["gap_lorenz_domain"][5] == pytest.approx(float(positive.max() / positive.sum()))


def test_memory_is_that_of_the_sums(parent: Path) -> None:
    """Two groups and a probe, or two groups for each branch, of float32; at TP2 and PP2 of about half the model."""
    parameters = sum(parameter.numel() for parameter in problem(parent, "untied").network.parameters())
    (rank,) = run_layout(parent, "untied", "tp1")
    padding = 2 * (384 - 300) * 40  # the vocabulary's, in embedding and output layer
    for name, groups in (("every sample", 3), ("both branches", 4)):
        assert rank[name]["diagnostics_memory_gib"] * 2**30 == groups * 4 * (parameters + padding)
    for layout in ("tp2", "pp2"):
        for part in run_layout(parent, "untied", layout):
            assert (
                0.3
                < part["every sample"]["diagnostics_memory_gib"] / rank["every sample"]["diagnostics_memory_gib"]
                < 0.7
            )


# Training with and without ----------------------------------------------------------------------------------------

DIAGNOSTICS = {"gradient_diagnostics_interval": 2, "gradient_diagnostics_samples": 4}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2-sp, bf16": (2, TP2 | {"sequence_parallel": True, "bf16": True}),
    "pp2, bf16 reduced in bf16": (2, PP2 | {"bf16": True, "grad_reduce_in_bf16": True, "overlap_grad_reduce": True}),
    "dp2, sharded optimizer, both branches": (
        2, LAYOUTS["dp2-overlap"][1] | {"bf16": True, "distill_method": "mopd", "mixing_ratio": "1:1"},
    ),
}  # fmt: skip


def pretrain(line: list[str]) -> int:
    """The entry point on one of ``run_ranks``' processes; its exit status."""
    import sys

    import pretrain_camopd

    sys.argv = ["pretrain_camopd.py", *line]
    return pretrain_camopd.main()


@pytest.mark.parametrize("name", RUNS)
def test_training_is_bit_identical_with_and_without(parent: Path, name: str) -> None:
    """Five steps, with diagnostics in one go and with a stop and a resume in between, against five without.

    Of an alternating schedule, steps 0 and 4 are general, step 2 is a domain step: both branches are probed.
    """
    world = World(parent / f"training {name}")
    world.root.mkdir()
    for seed, folder in enumerate((world.student, world.teacher)):
        make_checkpoint(folder, seed=seed, **(SIZES | MODELS["tied"]))
    write_prompts(world.general, "general")
    write_prompts(world.domain, "domain")
    ranks, changes = RUNS[name]
    lines: dict[str, list[dict[str, Any]]] = {
        "without": [{}],
        "with": [DIAGNOSTICS],
        "resumed": [DIAGNOSTICS | {"exit_interval": 3}, DIAGNOSTICS],
    }
    settings: dict[str, Any] = {
        "recovery_steps": 2,
        "train_iters": 5,
        "save_interval": 5,
        "max_response_length": 8,
        "lr": 1e-3,
    }
    if "distill_method" in changes:
        settings["recovery_steps"] = None
    for save, runs in lines.items():
        for options in runs:
            line = world.flags(save=world.root / save, **settings, **changes, **options)
            assert run_ranks(pretrain, ranks, line) == [0] * ranks
    records = {save: [without_costs(record) for record in read_records(world.root / save)] for save in lines}
    assert records["resumed"] == records["with"] and [record["step"] for record in records["with"]] == list(range(5))
    for with_them, without in zip(records["with"], records["without"], strict=True):
        added = with_them.keys() - without.keys()
        assert ("coherence_full" in added) == (without["step"] % 2 == 0) == bool(added)
        assert {key: with_them[key] for key in without} == without
        if added:
            check_findings(with_them, both_branches="distill_method" in changes)
    folders = [world.root / save / "iter_0000005" for save in lines]
    assert same_tensors(folders[0], folders[1]) and same_tensors(folders[0], folders[2])


def check_findings(record: dict[str, Any], *, both_branches: bool) -> None:
    """Step 0 serves general samples (and domain samples); its domain gradient is 0 to the bit: teacher is student."""
    first = record["step"] == 0
    norms = record["sample_grad_norms"]
    assert [norm > 0 for norm in norms] == [True, True, *[not (first and both_branches)] * 2]
    assert 0 < record["coherence_selected"] <= 1 + 1e-6 and 0 < record["coherence_full"] <= 1 + 1e-6
    assert record["general_grad_norm"] > 0 and (record["domain_grad_norm"] == 0) == first
    assert (record["branch_dot_product"] == 0) == (record["branch_cosine"] is None) == first
    names = {"gap_gini_general", "gap_gini_domain"} if both_branches else {"gap_gini"}
    assert names <= record.keys()


def read_records(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def without_costs(record: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory differ from run to run."""
    return {name: value for name, value in record.items() if not name.startswith(("time_", "peak_memory"))}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits, model and optimizer."""
    from megatron_camopd.checkpoint.torch_dist import TorchDistReader

    readers = TorchDistReader(one), TorchDistReader(other)
    shapes = readers[0].shapes
    assert shapes == readers[1].shapes and len(shapes) > 20
    zeros = {key: (0,) * len(shape) for key, shape in shapes.items()}
    return all(torch.equal(*(reader.read(key, zeros[key], shapes[key]) for reader in readers)) for key in shapes)
