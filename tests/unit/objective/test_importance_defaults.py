"""The defaults of the importance weights, which the flags, the objective and the fused head share."""

import inspect

import pytest

from megatron_camopd.kernels import distill_head
from megatron_camopd.objective import camopd_loss, importance_weights
from megatron_camopd.objective.importance import ImportanceSettings


def default(function: object, name: str) -> object:
    """Return the default of the argument ``name``."""
    return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [camopd_loss, distill_head])
def test_the_flags_and_the_functions_have_the_same_defaults(function: object) -> None:
    assert ImportanceSettings().weights == ("mask", 0.5, 5.0)  # the published values
    assert default(function, "importance") == ImportanceSettings().weights


def test_the_reference_formula_has_them_too() -> None:
    names = ("mode", "low", "high")
    assert tuple(default(importance_weights, name) for name in names) == ImportanceSettings().weights
