"""Gradient diagnostics of a training step, measured before its update and without effect on it.

    g_i = gradient over all parameters of  -(1 / L_i) sum_t w_t A_t log pi_theta(y_t | h_t)          (a term of Eq. 2)

g_i is computed for M samples of the global batch, with one backward pass each. It does not contain the method's
feedback scale and 1/|S|. The g_i give the coherence of all samples and of the selected ones, and the mean gradient of
each branch that the batch serves. The mean gradient of any other branch comes from a probe: M prompts from a separate
stream of that branch, with responses of the current student and scores of that branch's teacher, at the same
parameters. A batch that serves all branches needs no probe.

Cost: training M samples in micro-batches of one, one probe per branch that is not served, and sums of gradients in
float32. There are two sums per served branch (selected, not selected) and one per probe; each takes 4 bytes per
parameter of this rank's shard. With fp16, gradients that overflow under the loss scale give numbers that are not
finite, which are recorded as null.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_camopd.batch import ScoredBatch
from megatron_camopd.config.settings import Range, Settings, setting
from megatron_camopd.data import PromptBatch, PromptStream
from megatron_camopd.diagnostics.coherence import Group, branch_measures, coherence_measures, evenly_spaced
from megatron_camopd.diagnostics.concentration import gini_coefficient, lorenz_curve
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.model.passes import PassSettings, accumulate_gradients
from megatron_camopd.model.sample_gradients import (
    GradientSums,
    backward_of_sample,
    nothing_disturbed,
    own_gradients,
    squared_norms,
)
from megatron_camopd.objective import gap_scores, log_prob_gap, mean_coefficients
from megatron_camopd.objective.method import TrainingWeights, broadcast_to_tokens
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Layout, LayoutSizes
from megatron_camopd.schedule import BranchSpec


@dataclass(frozen=True, kw_only=True)
class DiagnosticsSettings(Settings):
    """CaMOPD diagnostics: measured on the way; training does not change."""

    gradient_diagnostics_interval: int = setting(
        0, within=Range(low=0, words="must be 0 (off) or more"), metavar="STEPS"
    )
    """how often gradients of single samples and of the branches are compared (0: never); costs a training pass one
    sample at a time and probe rollouts"""

    gradient_diagnostics_samples: int | None = setting(None, metavar="N")
    """samples of the global batch to look at, and probe prompts (default: as many as the batch has)"""

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check the number of samples against batch and layout, and set it if it was not given."""
        if args.gradient_diagnostics_samples is None:
            args.gradient_diagnostics_samples = args.global_batch_size
        elif not args.gradient_diagnostics_interval:
            raise ConfigurationError(
                "--gradient-diagnostics-samples: has no effect without --gradient-diagnostics-interval; give both"
            )
        data_parallel, samples = LayoutSizes.of(args).data, args.gradient_diagnostics_samples
        if samples < 1 or samples % data_parallel or samples > args.global_batch_size:
            raise ConfigurationError(
                f"--gradient-diagnostics-samples {samples}: must be a multiple of the data-parallel size "
                f"{data_parallel}, from 1 to --global-batch-size {args.global_batch_size}"
            )


class Collect(Protocol):
    """Function that samples and scores responses to prompts; collective."""

    def __call__(self, prompts: PromptBatch) -> ScoredBatch:
        """Return the scored responses to ``prompts``, the same global batch on every rank."""
        ...


class GradientDiagnostics:
    """Measurement of gradients every ``--gradient-diagnostics-interval`` steps.

    Args:
        settings: How often and on how many samples to measure.
        passes: Settings of the run's training passes.
        model: This rank's chunks of the student.
        branches: The table of branches.
        streams: Probe streams, which only this object reads: one for each branch that any step serves, by the branch's
            index in the table. Each measurement sets their positions from the number of the step, so there is no state
            to save.
        collect: Function that samples and scores the responses of a probe.
        first_probe_index: Index of a probe's first sample, beyond the indices of the step's global batch.
    """

    def __init__(
        self,
        settings: DiagnosticsSettings,
        passes: PassSettings,
        model: Sequence[MegatronModule],
        branches: Sequence[BranchSpec],
        streams: Mapping[int, PromptStream],
        collect: Collect,
        *,
        first_probe_index: int,
    ) -> None:
        assert len(model) == 1, "interleaved pipelines are refused by the arguments"
        assert settings.gradient_diagnostics_samples is not None, "set by DiagnosticsSettings.check_run"
        self._passes, self._model, self._branches = passes, model, branches
        self._streams, self._collect = streams, collect
        self._interval = settings.gradient_diagnostics_interval
        self._samples = settings.gradient_diagnostics_samples
        self._first_probe_index = first_probe_index

    def measure(self, step: int, batch: ScoredBatch, weights: TrainingWeights) -> dict[str, Any]:
        """Return the diagnostics of ``step``, the same on every rank; collective, called before the update.

        Args:
            step: Number of the step, from 0.
            batch: The step's global batch.
            weights: The weights that the method gave to it.

        Returns:
            Numbers for the step's record; empty in a step that is not measured.
        """
        if not self._interval or step % self._interval:
            return {}
        with nothing_disturbed(self._model):
            return self._gradients(step, batch, weights) | self._concentration(batch)

    def _gradients(self, step: int, batch: ScoredBatch, weights: TrainingWeights) -> dict[str, Any]:
        rows = evenly_spaced(self._samples, len(batch))
        served = list(batch.rows_by_branch())
        groups = [Group(branch, selected) for branch in served for selected in (True, False)]
        probed = [branch for branch in self._streams if branch not in served]
        groups += [Group(branch, probe=True) for branch in probed]
        sums = GradientSums(self._model, groups)

        places = [Group(int(batch.branches[row]), bool(weights.selected[row])) for row in rows.tolist()]
        norms = self._samples_backward(batch, rows, places, weights.advantage_floor, sums)
        for branch in probed:
            self._probe_backward(step, branch, weights.advantage_floor, sums)
        products = sums.products()

        names = {branch: self._branches[branch].name for branch in self._streams}
        counts = {branch: sum(place.branch == branch for place in places) for branch in names}
        counts |= {branch: 1 for branch in probed}  # the sum of a probe is already a mean
        return {
            **coherence_measures(groups, products, norms, weights.selected[rows]),
            **(branch_measures(groups, products, counts, names) if len(names) > 1 else {}),
            "sample_grad_norms": [norm if math.isfinite(norm) else None for norm in norms.tolist()],
            "diagnostics_memory_gib": sums.bytes / 2**30,
        }

    def _samples_backward(
        self, batch: ScoredBatch, rows: Tensor, places: Sequence[Group], floor: float | None, sums: GradientSums
    ) -> Tensor:
        """Add g_i of the samples ``rows`` [M] to the sums of their groups, and return the norms, [M] float64."""
        coefficients = broadcast_to_tokens(
            1.0 / batch.rollout.response_lengths.clamp(min=1).double(), batch.response_mask
        )
        coefficients = _without_zero_advantages(batch, coefficients, floor)
        squares = torch.zeros(len(rows), dtype=torch.float64, device=accelerator.current().device)
        data = Layout.current().data
        for number in range(data.rank, len(rows), data.size):
            row = int(rows[number])
            if not coefficients[row].any():
                continue
            with own_gradients(self._model):
                backward_of_sample(self._passes, self._model, batch, row, coefficients, floor)
            squares[number] = sums.add(places[number])
        return squared_norms(squares).sqrt()

    def _probe_backward(self, step: int, branch: int, floor: float | None, sums: GradientSums) -> None:
        """Add the mean gradient of a branch that the batch does not serve, from prompts of its probe stream."""
        self._streams[branch].seek(step // self._interval * self._samples)
        counts = [self._samples if place == branch else 0 for place in range(len(self._branches))]
        prompts = PromptBatch.draw(self._streams, counts, first_index=self._first_probe_index)
        probe = self._collect(prompts)
        coefficients = broadcast_to_tokens(mean_coefficients(probe.rollout.response_lengths), probe.response_mask)
        with own_gradients(self._model):
            coefficients = _without_zero_advantages(probe, coefficients, floor)
            accumulate_gradients(self._passes, self._model, probe, coefficients, floor)
        # accumulate_gradients expects an average over the data-parallel ranks; these sums add the ranks up.
        sums.add(Group(branch, probe=True), 1.0 / Layout.current().data.size)

    def _concentration(self, batch: ScoredBatch) -> dict[str, Any]:
        """Return Lorenz curve and Gini coefficient of each branch's scores, by keys that name the branch.

        If the batch has one branch, the keys do not name it.
        """
        gap = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
        values: dict[str, Any] = {}
        rows_by_branch = batch.rows_by_branch()
        for number, rows in rows_by_branch.items():
            branch = self._branches[number]
            scores = gap_scores(gap[rows], batch.response_mask[rows], branch.score)
            suffix = f"_{branch.name}" if len(rows_by_branch) > 1 else ""
            values |= {f"gap_lorenz{suffix}": lorenz_curve(scores), f"gap_gini{suffix}": gini_coefficient(scores)}
        return values


def _without_zero_advantages(batch: ScoredBatch, coefficients: Tensor, floor: float | None) -> Tensor:
    """Return ``coefficients`` [N, R] with 0 on tokens whose advantage is exactly 0.

    The student may be its own domain teacher. The two scores of a token are then equal bit for bit, but the backward
    pass computes the student's log-probability again, with other padding and other rounding. Without this function the
    rounding error would count as a gradient and its direction as counteraction.
    """
    advantage = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
    if floor is not None:
        advantage = advantage.clamp(min=floor)
    return coefficients.where(advantage != 0, 0.0)
