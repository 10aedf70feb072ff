"""The console line of a fine-tuning step: what the length limit takes away is there when it takes something."""

from typing import Any

import pytest

from megatron_camopd.stages.sft.runner import SftRunner

RECORD: dict[str, Any] = {
    "step": 3, "loss": 1.5, "grad_norm": 0.25, "conversations": 7, "conversations_skipped": 0, "turns_dropped": 0,
    "tokens": 400, "trained_tokens": 100, "packed_fraction": 0.8, "epoch": 0.5, "learning_rate": 1e-5, "skipped": 0,
    "time_data": 0.1, "time_train": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("skipped", "dropped", "words"),
    [
        (0, 0, "conversations 7  tokens 400"),
        (2, 0, "conversations 7  (2 too long)  tokens 400"),
        (0, 5, "conversations 7  (5 turns cut off)  tokens 400"),
        (11, 1200, "conversations 7  (11 too long)  (1200 turns cut off)  tokens 400"),
    ],
)
def test_console_line(skipped: int, dropped: int, words: str) -> None:
    assert words in SftRunner.console_line(RECORD | {"conversations_skipped": skipped, "turns_dropped": dropped})
