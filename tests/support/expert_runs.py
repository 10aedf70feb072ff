"""Fine-tuning runs of a model with experts: layouts with expert parallelism, and their inputs."""

import functools
import json
from pathlib import Path
from typing import Any

from tests.support.expert_models import TRAINED
from tests.support.worlds import World, make_checkpoint

SHARDED = {"use_distributed_optimizer": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, EP2),
    "ep2, sharded optimizer": (2, EP2 | SHARDED),
    "dp4 ep2": (4, EP2 | SHARDED),
    "dp4 ep4": (4, {"expert_model_parallel_size": 4}),
    "tp2 ep2": (2, EP2 | {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2 dp2 ep2": (4, EP2 | SHARDED | {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2 ep2": (4, EP2 | {"pipeline_model_parallel_size": 2}),
    "ep2 cp2": (2, EP2 | {"context_parallel_size": 2}),
}


@functools.cache
def world(parent: Path) -> World:
    """A model with experts, and conversations of very different lengths."""
    found = World(parent / "world")
    found.root.mkdir()
    make_checkpoint(found.student, seed=1, **TRAINED)
    lengths = [3, 70, 9, 41, 1, 88, 17, 30, 55, 5, 23, 64]
    rows = []
    for n in lengths:
        answer = "".join(chr(97 + (n * k) % 26) for k in range(n))
        question = {"role": "user", "content": "q" * (n % 7 + 1)}
        rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
    (found.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found
