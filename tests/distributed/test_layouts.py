"""One training step on every parallel layout: the same rollouts, scores, selection, loss and gradients.

The reference is Hugging Face's Qwen3 with autograd: it is given the rollouts of the step, scores them with student and
teacher and computes Eq. 7 of the paper in float64. Parameters are compared one by one through the name table.

Tolerances. Everything runs in float32, whose sums over a few hundred terms in another order differ by some 1e-7 of
the result; Hugging Face computes norms, rotary angles and the softmax of attention in float32 even inside a float64
model. 1e-5 is what a loss or gradient is allowed, relative to its norm; a missing all-reduce or a wrong factor is off
by far more.
"""

from pathlib import Path

import pytest
import torch

from megatron_camopd.batch import RolloutBatch
from tests.support.layouts import (
    CLIP,
    LAYOUTS,
    LEARNING_RATE,
    MODELS,
    SHORTEST,
    STEPS,
    join,
    reference,
    reference_scores,
    relative_error,
    run_layout,
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


# The tests --------------------------------------------------------------------------------------------------------

NO_SEQUENCE_PARALLELISM = {"tp2-sp": "tp2", "tp2-pp2-sp": "tp2-pp2", "cp2-tp2-sp": "cp2"}
"""Layouts with micro-batches of the same lengths."""
each_model = pytest.mark.parametrize("model", MODELS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_model
def test_steps_are_worth_comparing(parent: Path, model: str) -> None:
    """The cases contain what the other tests rely on: partial selections, dropped tokens, rows that end early."""
    for step in (*STEPS, SHORTEST):
        caught = run_layout(parent, model, "tp1")[0]["steps"][step]
        expected = reference(parent, model, step)
        lengths = caught["rollout"]["response_lengths"]
        count = int(expected["selected"].sum())
        assert count == 1 if "sample" in step else 1 < count < 8
        assert expected["dropped"] > 5 and abs(expected["loss"]) > 1e-2
        assert lengths.unique().numel() > 2 and caught["rollout"]["prompt_lengths"].unique().numel() > 2
        assert caught["rollout"]["truncated"].any() and not caught["rollout"]["truncated"].all()


@each_layout
@each_model
def test_rollouts_scores_and_selection_agree(parent: Path, model: str, layout: str) -> None:
    ranks = run_layout(parent, model, layout)
    for step in STEPS:
        expected = reference(parent, model, step)
        alone = run_layout(parent, model, "tp1")[0]["steps"][step]
        for rank in ranks:
            found = rank["steps"][step]
            for name in ("indices", "prompt_lengths", "response_lengths", "truncated"):
                assert torch.equal(found["rollout"][name], alone["rollout"][name]), (step, name)
            width = int((alone["rollout"]["prompt_lengths"] + alone["rollout"]["response_lengths"]).max())
            assert torch.equal(found["rollout"]["tokens"][:, :width], alone["rollout"]["tokens"][:, :width]), step
            for who in ("student", "teacher"):
                name = f"{who}_logprobs"
                torch.testing.assert_close(found[name].double(), expected[who], rtol=1e-5, atol=2e-5)
                assert torch.equal(found[name], ranks[0]["steps"][step][name]), f"ranks disagree about the {who}"
            gap = found["teacher_logprobs"].double() - found["student_logprobs"].double()
            branch = "domain" if step == "domain" else "general"
            scores = reference_scores(gap, RolloutBatch(**found["rollout"]), branch)
            # A score is a mean over a few tokens of log-probabilities, each of which may be off by 2e-5 (above).
            torch.testing.assert_close(scores, expected["scores"], rtol=1e-5, atol=5e-6)
            assert torch.equal(found["selected"], expected["selected"]), step
            assert torch.equal(found["coefficients"], alone["coefficients"]), step


@each_layout
@each_model
def test_loss_and_gradients_are_those_of_the_formulas(parent: Path, model: str, layout: str) -> None:
    ranks = run_layout(parent, model, layout)
    for step in (*STEPS, SHORTEST):
        expected = reference(parent, model, step)
        for rank in ranks:
            record = rank["steps"][step]["record"]
            # Its terms have both signs: what rounding can do is measured by their size, not by what they sum to.
            assert record["loss"] == pytest.approx(expected["loss"], abs=3e-6 * expected["magnitude"]), step
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), step
            assert record["skipped"] == 0 and record["selected_fraction"] == float(expected["selected"].double().mean())
        clip = min(1.0, CLIP[model] / expected["grad_norm"])
        gradients = join(parent, model, ranks, lambda rank: rank["steps"][step]["gradients"])  # noqa: B023 - used at once
        assert gradients.keys() == expected["gradients"].keys()
        for name, gradient in gradients.items():
            error = relative_error(gradient, clip * expected["gradients"][name])
            assert error < 1e-5, f"{step}: gradient of {name} is off by {error:.1e}"


@each_layout
@each_model
def test_weights_after_the_step(parent: Path, model: str, layout: str) -> None:
    """Plain SGD: new = old - learning rate x clipped gradient."""
    ranks = run_layout(parent, model, layout)
    initial = join(parent, model, ranks, lambda rank: rank["initial"])
    expected = reference(parent, model, "general")
    weights = join(parent, model, ranks, lambda rank: rank["steps"]["general"]["weights"])
    clip = min(1.0, CLIP[model] / expected["grad_norm"])
    assert (clip < 1.0) == (model == "tied")
    for name, weight in weights.items():
        change = -LEARNING_RATE * clip * expected["gradients"][name]
        error = (weight.double() - initial[name].double() - change).norm()
        assert error < 1e-5 * change.norm() + 1e-7 * weight.double().norm(), name  # the latter: rounding of the sum
        assert change.norm() > 1e-5 * weight.double().norm(), f"{name} hardly moves: nothing is tested"


@each_layout
@each_model
def test_sequence_parallelism_is_on_where_it_should_be(parent: Path, model: str, layout: str) -> None:
    """Training and scoring see 1/tp of the sequence per rank, decoding all of it; elsewhere it is off throughout.

    At two ranks the metrics with and without are often the same bits, and rightly so: every all-reduce adds two terms,
    in whatever order, and only the gradients of the norms' weights are summed in another order.
    """
    ranks = run_layout(parent, model, layout)
    size = 2 if "sp" in layout else 1
    for rank in ranks:
        whole = [item for item in rank["seen"] if not item[0]]
        decoding = [item for item in rank["seen"] if item[0]]
        assert {item[1:3] for item in whole} == {(size == 2, size == 2)}
        assert {item[1:3] for item in decoding} == {(False, False)}
        assert min(item[3] for item in decoding) == 1
    packed, halves = (
        {item[3] for rank in found for item in rank["seen"] if not item[0]}
        for found in (run_layout(parent, model, NO_SEQUENCE_PARALLELISM.get(layout, layout)), ranks)
    )
    assert len(packed) > 2 and halves == {-(-length // size) for length in packed}
