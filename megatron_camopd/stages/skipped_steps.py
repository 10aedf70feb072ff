"""Count of the steps that changed nothing because loss or gradients were not finite, and when a run gives up."""

from typing import Any

_WINDOW = 4


class SkippedSteps:
    """The skipped steps of a run, of all data and of each source of data (a branch).

    A run gives up after ``limit`` skipped steps in a row, of all or of one source: good steps of one branch say nothing
    of another, which may never succeed. It also gives up when half of the last ``4 * limit`` steps of one source were
    skipped, because then good steps in between keep the count low.

    Attributes:
        in_a_row: Number of skipped steps in a row, the last one included.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._window = limit, _WINDOW * limit
        self.in_a_row = 0
        self._by_source: dict[str, int] = {}
        self._recent: dict[str, str] = {}  # the last steps of each source, the newest at the end: "1" if skipped

    def count(self, skipped: bool, source: str) -> tuple[int, str] | None:
        """Count a step of ``source``.

        Returns:
            None while the run may go on, else the number of skipped steps and what it is the number of. The text ends
            with ``{source}`` if the steps were those of one source.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        of_source = self._by_source[source] = self._by_source.get(source, 0) + 1 if skipped else 0
        recent = self._recent[source] = (self._recent.get(source, "") + str(int(skipped)))[-self._window :]
        if max(of_source, self.in_a_row) >= self._limit:
            most_of_source = of_source >= self.in_a_row
            return max(of_source, self.in_a_row), "steps in a row" + "{source}" * most_of_source
        if recent.count("1") >= self._window // 2:
            return recent.count("1"), f"of the last {len(recent)} steps" + "{source}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "skipped_in_a_row": self.in_a_row,
            "skipped_by_source": dict(self._by_source),
            "skipped_recently": dict(self._recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the counts of ``state``; older states lack some of them."""
        self.in_a_row = state["skipped_in_a_row"]
        self._by_source = dict(state.get("skipped_by_source", {}))
        self._recent = dict(state.get("skipped_recently", {}))
