"""Optimizer states of runs with and without expert parallelism, made to fit each other.

With expert parallelism Megatron chains two distributed optimizers, one of the dense parameters and one of the experts;
without it there is one. The large tensors of a state are found by their names either way. The rest (parameter groups
and step counts) is an entry for each optimizer of the chain, or one without a number.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def any_expert_parallelism(optimizer: Any) -> Iterator[None]:
    """Let ``optimizer`` load states that were saved with or without expert parallelism."""
    parts, plain = len(getattr(optimizer, "chained_optimizers", [optimizer])), optimizer.load_state_dict

    def load(state: Any) -> None:
        if isinstance(state, dict):
            state = _as_one(state) if parts == 1 else _as_chain(state, parts)
        plain(state)

    optimizer.load_state_dict = load
    try:
        yield
    finally:
        del optimizer.load_state_dict


def _as_one(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the state of a single optimizer: of a chain, the entry of the dense parameters and what has no number."""
    numbered = [key for key in state if isinstance(key, int)]
    if not numbered:
        return state
    dense: dict[Any, Any] = state[min(numbered)]
    return {key: value for key, value in state.items() if key not in numbered} | dense


def _as_chain(state: dict[Any, Any], parts: int) -> dict[Any, Any]:
    """Return the state of a chain: of a single optimizer, a copy for each part, the experts' marked as such."""
    if all(isinstance(key, int) for key in state):
        return state
    unnumbered = {key: value for key, value in state.items() if not isinstance(key, int)}
    chain = {}
    for part in range(parts):
        chain[part] = copy.copy(unnumbered) | state.get(part, {})
        if part and "optimizer" in chain[part]:
            chain[part]["optimizer"] = copy.deepcopy(chain[part]["optimizer"])
            for group in chain[part]["optimizer"].get("param_groups", []):
                group["is_expert_parallel"] = True
    return chain
