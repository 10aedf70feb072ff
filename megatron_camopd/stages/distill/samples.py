"""The log of rollouts as text, ``<save>/samples.jsonl``.

Each line is a JSON object with prompt and response, the branch and the id of the prompt's row, whether the sample was
selected, the gap between teacher and student on it, and the tokens with the largest gaps. A resumed run drops the lines
of steps after its checkpoint. ``tools/report.py`` shows the file.
"""

import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_camopd.batch import ScoredBatch
from megatron_camopd.config.settings import Range, Settings, at_least, setting
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.objective import gap_scores, log_prob_gap
from megatron_camopd.schedule import BranchSpec
from megatron_camopd.stages.metrics import drop_later_steps

FILE = "samples.jsonl"
_LARGEST_GAPS = 32  # number of tokens of a response that are listed with their gaps
_CONTEXT = 8  # number of tokens decoded before a position, because a token's text may depend on those before it


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Settings):
    """CaMOPD samples: rollouts written as text, to look at what the student says."""

    log_samples: int = setting(0, within=Range(low=0, words="must be 0 (off) or more"), metavar="N")
    """rollouts of each branch written to <save>/samples.jsonl, spread evenly over its prompts of a step (0: none)"""

    log_samples_interval: int | None = setting(None, within=at_least(1), metavar="STEPS")
    """how often: once in so many steps, at the first of them that serves the branch (default: 20)"""

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check that no interval is given without samples, and set the default interval."""
        if args.log_samples_interval is not None and not args.log_samples:
            raise ConfigurationError("--log-samples-interval: has no effect without --log-samples; give both")
        args.log_samples_interval = args.log_samples_interval or 20


class SampleLog:
    """Writer of ``samples.jsonl``.

    Args:
        settings: How many samples to write, and how often.
        tokenizer: The student's tokenizer.
        branches: The table of branches.
        serves: Function from the number of a step to the branches that it serves.
        directory: The run's ``--save``; None on ranks that do not write.
        first_step: Number of the first step of this process; lines of this step and later ones are dropped.
    """

    def __init__(
        self,
        settings: SampleSettings,
        tokenizer: PreTrainedTokenizerBase,
        branches: Sequence[BranchSpec],
        serves: Callable[[int], Collection[int]],
        *,
        directory: str | None,
        first_step: int,
    ) -> None:
        self._settings, self._tokenizer, self._branches, self._serves = settings, tokenizer, branches, serves
        self._path = None if directory is None else Path(directory) / FILE
        self._seen: set[int] = set()  # branches that steps of the interval served,
        self._next = 0  # from its first step to the one before this
        if self._path is not None:
            drop_later_steps(self._path, first_step)

    def write(self, step: int, batch: ScoredBatch, selected: Tensor) -> None:
        """Append samples of each branch that ``step`` is the first of its interval to serve.

        A file that cannot be written is reported on the console and costs its samples alone, not the run.

        Args:
            step: Number of the step.
            batch: The step's global batch, scored before the update.
            selected: [N] bool, the samples that the method selected.
        """
        if self._path is None or not self._settings.log_samples:
            return
        lines = [
            json.dumps(self._sample(step, batch, row, bool(selected[row])), ensure_ascii=False) + "\n"
            for branch in sorted(self._due(step))
            for row in _spread((batch.branches == branch).nonzero().flatten().tolist(), self._settings.log_samples)
        ]
        if not lines:
            return
        size = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                size = file.tell()
                file.writelines(lines)
        except OSError as error:
            if size is not None:  # half a line would spoil the next one
                os.truncate(self._path, size)
            print(f"{self._path}: {len(lines)} samples of step {step} were not written ({error.strerror})", flush=True)

    def _due(self, step: int) -> set[int]:
        """Return the branches that ``step`` serves and that no earlier step of its interval served.

        Writing at the first step of each interval instead would always show the same branch if the interval is a
        multiple of the schedule's length.
        """
        assert self._settings.log_samples_interval is not None, "check_run sets it"
        first = step - step % self._settings.log_samples_interval
        if not first <= self._next <= step:
            self._seen, self._next = set(), first
        for earlier in range(self._next, step):
            self._seen |= set(self._serves(earlier))
        self._next = step
        return set(self._serves(step)) - self._seen

    def _sample(self, step: int, batch: ScoredBatch, row: int, selected: bool) -> dict[str, Any]:
        rollout, branch = batch.rollout, self._branches[int(batch.branches[row])]
        prompt_length, length = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        prompt = rollout.tokens[row, :prompt_length].tolist()
        response = rollout.tokens[row, prompt_length : prompt_length + length].tolist()
        gap = log_prob_gap(batch.teacher_logprobs[row, :length], batch.student_logprobs[row, :length]).double()
        return {
            "step": step,
            "branch": branch.name,
            "id": batch.prompt_ids[row],
            "category": batch.categories[row],
            "prompt": self._decode(prompt),
            "response": self._decode(response),
            "prompt_length": prompt_length,
            "response_length": length,
            "truncated": bool(rollout.truncated[row]),
            "score": _finite(float(gap_scores(gap[None], torch.ones(1, length), branch.score))),
            "selected": selected,
            "gap_mean": _finite(float(gap.mean())),
            "gap_abs_mean": _finite(float(gap.abs().mean())),
            "largest_gaps": self._largest_gaps(response, gap),
        }

    def _largest_gaps(self, response: Sequence[int], gap: Tensor) -> list[dict[str, Any]]:
        """Return the tokens with the largest absolute gaps, in order of position, with their place in the text."""
        count = min(_LARGEST_GAPS, len(response))
        positions = sorted(gap.abs().nan_to_num(nan=torch.inf).topk(count).indices.tolist())
        found, offset, place = [], 0, 0
        for position in positions:
            start = offset + self._width(response, place, position)
            end = start + self._width(response, position, position + 1)
            token = self._decode(response[position : position + 1])
            value = _finite(float(gap[position]))
            found.append({"position": position, "start": start, "end": end, "token": token, "gap": value})
            offset, place = start, position
        return found

    def _width(self, token_ids: Sequence[int], start: int, end: int) -> int:
        """Return how many characters the tokens from ``start`` to ``end`` add to the text."""
        context = max(0, start - _CONTEXT)
        before, after = (self._decode(token_ids[context:place]) for place in (start, end))
        # A character whose bytes lie in several tokens decodes to replacement characters until it is complete.
        return max(0, len(after.rstrip("\ufffd")) - len(before.rstrip("\ufffd")))

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _spread(rows: list[int], count: int) -> list[int]:
    """Return ``count`` of ``rows`` at even distances, or all if there are fewer."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _finite(value: float) -> float | None:
    """Return ``value``, or None if it is not finite, because JSON has no such numbers."""
    return value if math.isfinite(value) else None
