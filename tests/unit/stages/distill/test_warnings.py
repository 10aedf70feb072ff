"""The warnings of a distillation step: no response ended, engine and trainer disagree, or both."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_camopd.stages.distill.runner import DistillRunner
from tests.support.worlds import make_tokenizer


def warning(truncated: float, difference: float, *, ends: list[int], limit: int) -> str | None:
    record: dict[str, Any] = {
        "step": 7,
        "truncated_fraction": truncated,
        "rollout_train_logprob_abs_diff": difference,
        "rollout_train_logprob_abs_diff_max": 2 * difference,
        "importance_effective_fraction": 0.5,
    }
    plan = SimpleNamespace(tokenizer=make_tokenizer(), end_of_sequence_ids=ends)
    args = Namespace(max_response_length=limit, rollout_temperature=1.0)
    runner: Any = SimpleNamespace(plan=plan, args=args, usual_mismatch=0.1)
    return DistillRunner.step_warning(runner, record)


@pytest.mark.parametrize(("ends", "limit"), [([0], 24), ([0, 2], 8192)])
def test_a_step_without_an_end(ends: list[int], limit: int) -> None:
    assert warning(0.99, 0.05, ends=ends, limit=limit) is None
    line = warning(1.0, 0.05, ends=ends, limit=limit)
    assert line and "\n" not in line
    assert line.startswith(f"step 7: all responses reached --max-response-length {limit}, none ended with an")
    assert all(f"{number} ('" in line for number in ends)


def test_both_warnings_are_given() -> None:
    both = warning(1.0, 0.5, ends=[2], limit=24)
    assert both and both.split("\n") == [
        warning(1.0, 0.0, ends=[2], limit=24),
        warning(0.0, 0.5, ends=[2], limit=24),
    ]
