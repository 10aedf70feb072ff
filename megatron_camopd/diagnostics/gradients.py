"""Gradient diagnostics of a training step, measured before its update and with no effect on it.

    g_i = gradient over all parameters of  -(1 / L_i) sum_t w_t A_t log pi_theta(y_t | h_t)          (a term of Eq. 2)

for M samples of the global batch, one backward pass each; feedback scales and 1/|S| of the method are not in it. From
them come the coherence of all samples and of the selected ones, and the active branch's mean gradient. The other
branch's comes from a probe: M prompts of a stream of its own, rolled out by the current student, scored by that
branch's teacher, at the same parameters. A batch of both branches needs no probe.

Cost: as much as training M samples with microbatches of one, a probe, and float32 sums of gradients: two a branch that
the batch serves (selected, not selected) and one for the probe, 4 bytes a parameter of this rank's shard each. With
fp16, a loss scale under which gradients overflow gives numbers that are not finite; they are recorded as null.
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
    """Roll out prompts and score the responses: the global batch on every rank. Collective."""

    def __call__(self, prompts: PromptBatch) -> ScoredBatch: ...


class GradientDiagnostics:
    """Measures gradients every ``--gradient-diagnostics-interval`` steps.

    Args:
        settings: when, and on how many samples.
        passes: of the run's training passes.
        model: this rank's chunks of the student.
        branches: the run's table of branches.
        streams: a probe stream for each branch that is ever served, by its place in the table, used by nobody else.
            Where they stand is decided anew by every measurement from the step's number, so there is no state to save.
        collect: rolls out and scores the prompts of a probe.
        first_probe_index: the place in the global batch that a probe's first sample stands for, behind the step's own.
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
        """Return numbers for the record of ``step``, the same on every rank; {} in steps that are not measured.

        batch: the step's global batch; weights: the method's answer about it. Called before the update. Collective.
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
        counts |= {branch: 1 for branch in probed}  # its sum is already a mean
        return {
            **coherence_measures(groups, products, norms, weights.selected[rows]),
            **(branch_measures(groups, products, counts, names) if len(names) > 1 else {}),
            "sample_grad_norms": [norm if math.isfinite(norm) else None for norm in norms.tolist()],
            "diagnostics_memory_gib": sums.bytes / 2**30,
        }

    def _samples_backward(
        self, batch: ScoredBatch, rows: Tensor, places: Sequence[Group], floor: float | None, sums: GradientSums
    ) -> Tensor:
        """g_i of the samples ``rows`` [M] into the sums of their groups ``places``; their norms [M] float64."""
        coefficients = broadcast_to_tokens(
            1.0 / batch.rollout.response_lengths.clamp(min=1).double(), batch.response_mask
        )
        coefficients = _of_feedback(batch, coefficients, floor)
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
            accumulate_gradients(self._passes, self._model, probe, _of_feedback(probe, coefficients, floor), floor)
        # It expects DDP to average over the data-parallel ranks, whose gradients are summed here.
        sums.add(Group(branch, probe=True), 1.0 / Layout.current().data.size)

    def _concentration(self, batch: ScoredBatch) -> dict[str, Any]:
        """Return Lorenz curve and Gini coefficient of each branch's scores, without suffix where there is one."""
        gap = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
        values: dict[str, Any] = {}
        rows_by_branch = batch.rows_by_branch()
        for number, rows in rows_by_branch.items():
            branch = self._branches[number]
            scores = gap_scores(gap[rows], batch.response_mask[rows], branch.score)
            suffix = f"_{branch.name}" if len(rows_by_branch) > 1 else ""
            values |= {f"gap_lorenz{suffix}": lorenz_curve(scores), f"gap_gini{suffix}": gini_coefficient(scores)}
        return values


def _of_feedback(batch: ScoredBatch, coefficients: Tensor, floor: float | None) -> Tensor:
    """``coefficients`` [N, R], 0 on tokens whose advantage is exactly 0.

    The student may be its own domain teacher. Both then scored the tokens alike bit for bit, but a pass with other
    padding rounds otherwise: noise would be taken for a gradient, and its direction for counteraction.
    """
    advantage = log_prob_gap(batch.teacher_logprobs, batch.student_logprobs)
    if floor is not None:
        advantage = advantage.clamp(min=floor)
    return coefficients.where(advantage != 0, 0.0)
