"""Write the first steps of a run's metrics.jsonl as the golden curve: python tests/golden/write_curve.py METRICS."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.golden import CURVE, FIGURES  # noqa: E402

STEPS = 4  # one round of the schedule


def main(metrics: str) -> None:
    records = [json.loads(line) for line in Path(metrics).read_text().splitlines()[:STEPS]]
    curve = [{name: record[name] for name in ("step", "branch", *FIGURES)} for record in records]
    CURVE.write_text(json.dumps(curve, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
