"""The Triton kernels compiled for NVIDIA's compute capabilities 8.0 and 9.0, on any machine, and what is in their PTX.

What the interpreter cannot show: instructions whose order of execution is open (atomics), a barrier that the compiler
left out or moved, limits that lose NaN, row offsets in 32 bits, loads of single numbers. One process compiles
everything: it must see Triton as it is without ``TRITON_INTERPRET``.
"""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90)
# name: kernel, constants, dtype of the gradient; each constant takes every value somewhere.
KERNELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "partials-1": ("_partials_kernel", {"TARGETS": 1}, ""),
    "partials-3": ("_partials_kernel", {"TARGETS": 3}, ""),
    "distill-rows": ("_distill_kernel", {"PARTS": 0, "MODE": 1, "HAS_FLOOR": True, "WRITE": True}, "*bf16"),
    "distill-parts": ("_distill_kernel", {"PARTS": 2, "MODE": 2, "HAS_FLOOR": False, "WRITE": True}, "*bf16"),
    "distill-fp32": ("_distill_kernel", {"PARTS": 2, "MODE": 0, "HAS_FLOOR": False, "WRITE": True}, "*fp32"),
    "distill-forward": ("_distill_kernel", {"PARTS": 0, "MODE": 0, "HAS_FLOOR": True, "WRITE": False}, "*fp32"),
    "softmax-bf16": ("_softmax_gradient_kernel", {"TARGETS": 2}, "*bf16"),
    "softmax-fp32": ("_softmax_gradient_kernel", {"TARGETS": 1}, "*fp32"),
}
CASES = [f"{name}-sm{capability}" for name, capability in itertools.product(KERNELS, CAPABILITIES)]
GRADIENTS = [case for case in CASES if not case.startswith(("partials", "distill-forward"))]
INTEGERS = ("row_stride", "gradient_stride", "width", "tokens")
FLOATS = ("low", "high", "floor", "inverse_temperature")


def compile_all(folder: Path) -> None:
    """Write the PTX of every case to ``folder``; the driver's own assembler has accepted it too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_camopd.kernels import rows_triton
    from megatron_camopd.kernels.row_operations import RECORD

    for name, (kernel, constants, gradient) in KERNELS.items():
        function = getattr(rows_triton, kernel)
        constants = constants | {"BLOCK": rows_triton._BLOCK}
        if kernel == "_distill_kernel":
            constants["FIELDS"] = len(RECORD)
        types = dict.fromkeys(function.arg_names, "*fp32")
        types |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32")
        types |= {"columns": "*i64", "gradient": gradient} | dict.fromkeys(constants, "constexpr")
        signature = {argument: types[argument] for argument in function.arg_names}
        # As at a launch: the allocator's pointers, and rows as far apart as ``empty_logits`` puts them.
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, (argument, kind) in enumerate(signature.items())
            if kind.startswith("*") or argument in INTEGERS and argument != "tokens"
        }
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
        for capability in CAPABILITIES:
            options = {"num_warps": rows_triton._WARPS}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            (folder / f"{name}-sm{capability}.ptx").write_text(compiled.asm["ptx"])


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the code of every case, without comments and debug lines."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    folder = tmp_path_factory.mktemp("ptx")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, str(folder)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr[-3000:]
    return {case: re.sub(r"//.*|\.loc\b.*", "", (folder / f"{case}.ptx").read_text()) for case in CASES}


def loops(code: str) -> list[str]:
    """The text between a label and each later jump back to it."""
    found = []
    for label in re.finditer(r"^(\$L__BB\w+):", code, re.MULTILINE):
        for jump in re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", code[label.end() :]):
            found.append(code[label.end() : label.end() + jump.end()])
    return found


@pytest.mark.parametrize("case", CASES)
def test_no_atomics_and_no_double_precision(case: str, ptx: dict[str, str]) -> None:
    assert "ld.global" in ptx[case] and "st.global" in ptx[case]
    assert not re.search(r"\b(atom|red)\.", ptx[case])
    assert ".f64" not in ptx[case]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("distill")])
def test_limits_pass_on_nan(case: str, ptx: dict[str, str]) -> None:
    """A floor, a clip, the merging of parts: the interpreter's minimum and maximum do that unasked, a GPU's do not."""
    constants = KERNELS[case.rsplit("-", 1)[0]][1]
    assert ("max.NaN.f32" in ptx[case]) == bool(constants["HAS_FLOOR"] or constants["PARTS"])
    assert ("min.NaN.f32" in ptx[case]) == (constants["MODE"] == 2)
    if constants["PARTS"]:  # else the maximum of the row is among them: there the sums become NaN
        assert not re.search(r"\b(max|min)\.f32", ptx[case])


@pytest.mark.parametrize("case", CASES)
def test_row_offsets_have_64_bits(case: str, ptx: dict[str, str]) -> None:
    """The number of the row is widened before anything is done to it."""
    (register,) = re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.x;", ptx[case])
    uses = re.findall(rf"^\s*(\S+)\s.*, {register}\b", ptx[case], re.MULTILINE)
    assert uses and all(re.fullmatch(r"cvt\.[us]64\.[us]32|(mul|mad)\.wide\.[us]32", use) for use in uses), uses


@pytest.mark.parametrize("case", CASES)
def test_rows_are_read_in_vectors(case: str, ptx: dict[str, str]) -> None:
    """Every loop over a row takes four numbers at a time of its 4,096 columns for 256 threads."""
    loads = [re.findall(r"ld\.global\S*", loop) for loop in loops(ptx[case])]
    assert any(loads)
    for loop in loads:
        assert sum(".v4.b32" in load for load in loop) == 4


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_barrier_keeps_the_gradient_behind_the_logits(case: str, ptx: dict[str, str]) -> None:
    """In the loop that writes: loads, then the barrier, then stores. They share memory."""
    writing = [loop for loop in loops(ptx[case]) if "st.global" in loop]
    assert len(writing) == 1
    order = re.findall(r"ld\.global|bar\.sync|st\.global", writing[0])
    steps = [step for step, _ in itertools.groupby(order)]
    assert steps == ["ld.global", "bar.sync", "st.global"], order
    assert "cp.async" not in ptx[case]  # loads of a later turn, begun before this one's stores


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
