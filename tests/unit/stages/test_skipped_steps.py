"""When skipped steps end a run: in a row, in a row of one branch, or too many of one branch's last steps."""

import json
import random

import pytest

from megatron_camopd.stages.skipped_steps import SkippedSteps

Steps = list[tuple[str, bool]]


def end_of(steps: Steps, limit: int, *, resumed: bool = False) -> tuple[int, int, str] | None:
    """The number of steps after which a run gives up, and what it says; ``resumed``: saved and loaded at every step."""
    counter = SkippedSteps(limit)
    for number, (source, skipped) in enumerate(steps, start=1):
        found = counter.count(skipped, source)
        if found is not None:
            return number, *found
        if resumed:
            state = json.loads(json.dumps(counter.state_dict()))
            counter = SkippedSteps(limit)
            counter.load_state_dict(state)
    return None


GENERAL, DOMAIN = ("general", True), ("domain", False)
CASES: dict[str, tuple[Steps, int, tuple[int, int, str] | None]] = {
    "all": ([("general", True), ("domain", True)] * 9, 5, (5, 5, "steps in a row")),
    "one branch of 3:1": (([GENERAL] * 3 + [DOMAIN]) * 9, 5, (6, 5, "steps in a row{source}")),
    "one branch of 1:1": ([GENERAL, DOMAIN] * 9, 5, (9, 5, "steps in a row{source}")),
    "the rare branch": (([("general", False)] * 3 + [("domain", True)]) * 9, 5, (20, 5, "steps in a row{source}")),
    "never": ([("general", False), ("domain", False)] * 90, 1, None),
    "at once": ([("general", True)], 1, (1, 1, "steps in a row{source}")),
    # 4 of 5 steps of a branch skipped: never 5 in a row, but 10 of its first 12 or so.
    "mostly": ([("a", number % 5 != 4) for number in range(60)], 5, (12, 10, "of the last 12 steps{source}")),
    "every other": ([("a", number % 2 == 0) for number in range(60)], 5, (19, 10, "of the last 19 steps{source}")),
    "every other, other branch between": (
        [("b", False) if number % 2 else ("a", number % 4 == 0) for number in range(120)],
        5,
        (37, 10, "of the last 19 steps{source}"),
    ),
    "every third": ([("a", number % 3 == 0) for number in range(300)], 5, None),
    "a bad start long ago": ([("a", number < 4) for number in range(40)] + [("a", True), ("a", False)] * 3, 5, None),
}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_when_a_run_gives_up(case: tuple[Steps, int, tuple[int, int, str] | None], resumed: bool) -> None:
    steps, limit, expected = case
    assert end_of(steps, limit, resumed=resumed) == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_against_the_whole_history(limit: int) -> None:
    """The same decisions as from the full list of steps, for random runs."""
    for seed in range(300):
        chosen = random.Random(f"{limit} {seed}")
        rate = chosen.random()
        steps = [(chosen.choice("abc"), chosen.random() < rate) for _ in range(80)]
        expected = None
        for number in range(1, len(steps) + 1):
            done, own = (
                steps[:number],
                [skipped for source, skipped in steps[:number] if source == steps[number - 1][0]],
            )
            in_a_row = next((place for place, (_, skipped) in enumerate(reversed(done)) if not skipped), number)
            own_in_a_row = next((place for place, skipped in enumerate(reversed(own)) if not skipped), len(own))
            if max(in_a_row, own_in_a_row) >= limit or sum(own[-4 * limit :]) >= 2 * limit:
                expected = number
                break
        found = end_of(steps, limit)
        assert (found and found[0]) == expected


def test_states_of_older_versions() -> None:
    counter = SkippedSteps(3)
    counter.load_state_dict({"skipped_in_a_row": 2})
    assert counter.in_a_row == 2 and counter.count(True, "a") == (3, "steps in a row")
