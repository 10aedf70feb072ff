"""The rooms and floors of the package, read from its import statements.

A file imports from lower floors, from its own folder, or from a single-file room of its own floor; rooms never
import each other in a circle. The pure rooms import no Megatron. Few places touch ``megatron.training``.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_camopd"

# Which room lies on which floor, the lowest first.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "batch", "schedule", "counter_random", "runtime"}),
    frozenset({"config"}),
    frozenset({"objective", "kernels", "data"}),
    frozenset({"families"}),
    frozenset({"checkpoint"}),
    frozenset({"model"}),
    frozenset({"teachers", "rollout"}),
    frozenset({"diagnostics"}),
    frozenset({"stages"}),
)
LOOSE_MODULES = {"errors", "batch", "schedule", "counter_random"}
"""The rooms that are a single file."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PURE_ROOMS = ("objective", "kernels", "schedule", "data")
MAY_USE_MEGATRON_TRAINING = re.compile(r"rollout/megatron_engine\.py|(runtime|config|checkpoint|model|stages)/.+\.py")
TOP_LEVEL_FOLDERS = {
    ".ci", "checkpoints_convert", "docs", "examples", "megatron_camopd", "requirements", "tests", "tools",
}  # fmt: skip
TOP_LEVEL_SCRIPTS = {"pretrain_camopd.py", "setup.py"}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(file: str) -> str:
    """``objective/gap.py`` -> ``objective``; ``batch.py`` -> ``batch``; the package's ``__init__.py`` -> ''."""
    first = file.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Full names of what ``source`` imports, in functions and under TYPE_CHECKING too.

    ``from a import b`` gives ``a.b`` (b may be a module); relative imports are resolved against ``module``, the dotted
    name of the package that holds the file.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_name(file: str) -> str:
    """``objective/gap.py`` -> ``megatron_camopd.objective.gap``."""
    return ".".join(["megatron_camopd", *file.removesuffix(".py").split("/")]).removesuffix(".__init__")


def settings_classes(tree: ast.Module) -> list[ast.ClassDef]:
    """Classes that derive from Settings."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [cls for cls in classes if any(isinstance(base, ast.Name) and base.id == "Settings" for base in cls.bases)]


def fields_of(cls: ast.ClassDef) -> list[str]:
    """Names of a dataclass's fields."""
    return [
        node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def imports_of(file: str) -> set[str]:
    folder = ".".join(["megatron_camopd", *file.split("/")[:-1]])
    return set(imported_modules((PACKAGE / file).read_text(encoding="utf-8"), folder))


def rooms_imported(file: str) -> set[str]:
    """Rooms of this package that a file imports from, its own left out."""
    names = (name.split(".") for name in imports_of(file))
    return {name[1] for name in names if name[0] == "megatron_camopd" and len(name) > 1} - {room_of(file)}


def is_allowed(room: str, target: str) -> bool:
    """Whether a file in ``room`` may import from the room ``target``."""
    if FLOOR_OF[target] == FLOOR_OF[room]:
        return (PACKAGE / f"{target}.py").exists()
    return FLOOR_OF[target] < FLOOR_OF[room]


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def repository_files() -> list[str]:
    """Files that git tracks or would track; the test is skipped outside a git checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def test_import_reader_sees_every_form() -> None:
    source = """
import megatron_camopd.stages.distill.runner
from megatron_camopd.stages import metrics as m
from . import gap
from .. import errors
from ..schedule import BranchSchedule
def late():
    import megatron.core
"""
    assert set(imported_modules(source, "megatron_camopd.objective")) == {
        "megatron_camopd.stages.distill.runner",
        "megatron_camopd.stages.metrics",
        "megatron_camopd.objective.gap",
        "megatron_camopd.errors",
        "megatron_camopd.schedule.BranchSchedule",
        "megatron.core",
    }


def test_every_file_belongs_to_a_room() -> None:
    assert FILES
    strangers = {file for file in FILES if room_of(file) not in FLOOR_OF and room_of(file) != ""}
    assert not strangers, f"not in FLOORS: {sorted(strangers)}"


def test_every_room_exists() -> None:
    found = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__")
    }
    assert found == FLOOR_OF.keys()


def test_few_modules_are_loose() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == LOOSE_MODULES


def test_every_folder_is_a_package() -> None:
    """A folder without __init__.py would be missing from the wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) in FLOOR_OF])
def test_imports_go_down(file: str) -> None:
    room = room_of(file)
    unknown = {target for target in rooms_imported(file) if target not in FLOOR_OF and target != "__version__"}
    assert not unknown, f"{file} imports rooms that FLOORS does not know: {sorted(unknown)}"
    upward = {target for target in rooms_imported(file) & FLOOR_OF.keys() if not is_allowed(room, target)}
    assert not upward, f"{file} (floor {FLOOR_OF[room]}) imports {sorted((t, FLOOR_OF[t]) for t in upward)}"


def test_rooms_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        graph.setdefault(room_of(file), set()).update(rooms_imported(file))
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_files_form_no_circle() -> None:
    """Neither between rooms nor inside one."""
    file_of = {module_name(file): file for file in FILES}
    graph: dict[str, set[str]] = {}
    for file in FILES:
        parts = [name.split(".") for name in imports_of(file)]
        names = {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}
        graph[file] = {file_of[name] for name in names & file_of.keys()} - {file}
        # A package's own __init__ comes before its modules by Python's rules; that is no import of theirs.
        graph[file] -= {
            f"{'/'.join(file.split('/')[:depth])}/__init__.py".lstrip("/") for depth in range(file.count("/") + 1)
        }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_settings_are_read_through_their_dataclasses() -> None:
    """``args.<one of our settings>`` appears in config/, in checks of arguments and in Settings classes alone."""
    names, found = set(), []
    trees = {file: ast.parse((PACKAGE / file).read_text(encoding="utf-8")) for file in FILES}
    for tree in trees.values():
        names |= {name for cls in settings_classes(tree) for name in fields_of(cls)}
    assert {"rollout_temperature", "distill_method", "log_samples", "output_head"} <= names
    for file, tree in trees.items():
        if room_of(file) == "config":
            continue
        allowed: set[ast.AST] = set()
        for node in ast.walk(tree):
            if node in settings_classes(tree) or (
                isinstance(node, ast.FunctionDef) and node.name in ("check_arguments", "parse_arguments")
            ):
                allowed |= set(ast.walk(node))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in names and node not in allowed:
                owner = node.value
                if (isinstance(owner, ast.Name) and owner.id == "args") or (
                    isinstance(owner, ast.Attribute) and owner.attr == "args"
                ):
                    found.append(f"{file}:{node.lineno} args.{node.attr}")
    assert [place for place in found if not place.endswith("args.stage")] == []


def test_package_itself_imports_no_room() -> None:
    assert rooms_imported("__init__.py") == set()


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) in PURE_ROOMS])
def test_pure_rooms_name_no_megatron(file: str) -> None:
    assert {name for name in imports_of(file) if within(name, "megatron")} == set()


def test_pure_rooms_load_no_megatron() -> None:
    """Also not through what they import; in a process of its own, since other tests load Megatron."""
    modules = ", ".join(f"megatron_camopd.{room}" for room in PURE_ROOMS)
    program = f"import sys, {modules}; print(sorted(m for m in sys.modules if m.split('.')[0] == 'megatron'))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_few_places_touch_megatron_training() -> None:
    heavy = ("megatron.training", "megatron.core.inference")
    users = {file for file in FILES if any(within(name, module) for name in imports_of(file) for module in heavy)}
    assert {file for file in users if not MAY_USE_MEGATRON_TRAINING.fullmatch(file)} == set()


def test_package_imports_nothing_from_around_it() -> None:
    outside = ("tools", "tests", "examples", "checkpoints_convert", "pretrain_camopd")
    found = {(file, name) for file in FILES for name in imports_of(file) for o in outside if within(name, o)}
    assert found == set()


def test_top_level_holds_only_known_folders() -> None:
    names = repository_files()
    assert {name.split("/")[0] for name in names if "/" in name} - TOP_LEVEL_FOLDERS == set()
    assert {name for name in names if "/" not in name and name.endswith(".py")} - TOP_LEVEL_SCRIPTS == set()


def test_no_registry_address_is_written_down() -> None:
    """Which package index is used is the machine's business: no address of one, no option that sets one."""
    address = re.compile(r"(https?|file)://[^\s\"']*/simple\b")
    option = re.compile(r"^\s*(-i|-f|--(extra-)?index-url|--default-index|--index|--find-links)\b")
    found = []
    for name in repository_files():
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # not a text file
        is_requirements = name.startswith("requirements/")
        for number, line in enumerate(lines, start=1):
            if address.search(line) or (is_requirements and option.match(line)):
                found.append(f"{name}:{number}")
    assert found == []
