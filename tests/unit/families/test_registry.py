"""The registry of model families, and that nothing else in the package knows a family by name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.registry import FAMILIES, family_of

ROOT = next(parent for parent in Path(__file__).resolve().parents if (parent / "pyproject.toml").exists())
PACKAGE = ROOT / "megatron_camopd"
SHARED = "families/registry.py"  # the one file outside a family's folder that may name families
# The names of families that are known or expected, as they appear in model types, classes and module names.
NAMES = re.compile("|".join({"qwen", "llama", *(name.split("_")[0] for name in FAMILIES)}), re.IGNORECASE)


def code_of(source: str) -> str:
    """``source`` without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if hasattr(node, "body") and isinstance(node.body, list):
            # A string that stands alone documents what is around or above it.
            node.body = [
                line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.unparse(tree)


def test_the_reader_of_code_drops_words_and_keeps_names() -> None:
    source = '"""Qwen3."""\n# Qwen3\nX = 1\n"""Qwen3."""\ndef f():\n    """Qwen3."""\nclass A:\n    """Qwen3."""\n'
    assert not NAMES.search(code_of(source))
    for line in ("import x.qwen3", "X = 'is a dense Qwen3'", "class Qwen3Model: ...", "f(f'Qwen3 {x}')"):
        assert NAMES.search(code_of(source + line)), line


def test_no_code_outside_the_families_names_one() -> None:
    folders = tuple(f"families/{path.parent.name}/" for path in PACKAGE.glob("families/*/__init__.py"))
    assert folders
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == SHARED or name.startswith(folders):
            continue
        found += [(name, line) for line in code_of(path.read_text(encoding="utf-8")).splitlines() if NAMES.search(line)]
    assert found == []


def test_every_family_has_a_folder_and_is_registered_under_its_own_name() -> None:
    assert all(name == family.model_type for name, family in FAMILIES.items())
    assert {path.parent.name for path in PACKAGE.glob("families/*/__init__.py")} == FAMILIES.keys()


@pytest.mark.parametrize("value", ["mamba", "qwen3_next", "", None, 3, ["qwen3"]])
def test_an_unknown_model_type_is_one_line_that_names_the_known_ones(value: object) -> None:
    with pytest.raises(ConfigurationError) as raised:
        family_of({"model_type": value}, source="/models/x/config.json")
    known = " or ".join(f"{name!r} ({family.title})" for name, family in FAMILIES.items())
    assert str(raised.value) == f"/models/x/config.json: model_type is {value!r}; expected {known}"


def test_an_absent_model_type_is_named() -> None:
    with pytest.raises(ConfigurationError, match="^config.json: model_type is None; expected 'qwen3'"):
        family_of({})


def test_the_registry_loads_no_megatron() -> None:
    """In a process of its own, since other tests load Megatron."""
    program = (
        "import sys, megatron_camopd.families.registry, megatron_camopd.checkpoint.import_hf\n"
        "import megatron_camopd.checkpoint.export_hf\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
