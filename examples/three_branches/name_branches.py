"""Give the demo's general prompts the name of their branch: python name_branches.py INPUT OUTPUT."""

import json
import os
import sys
from pathlib import Path

BRANCH_OF = {"add": "numbers", "rev": "letters", "up": "letters", "dbl": "letters"}  # by the task's kind


def main(source: str, target: str) -> None:
    """Write every row of ``source`` to ``target`` with a "branch"."""
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "branch": BRANCH_OF[row["category"]]}) + "\n" for row in rows]
    partial = Path(f"{target}.partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
