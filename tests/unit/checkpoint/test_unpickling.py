"""Reading a checkpoint runs none of its code, whichever flag names it and whichever file holds it."""

import io
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.torch_dist import saved_arguments
from megatron_camopd.checkpoint.unpickling import RestrictedUnpickler, restricted_unpickling
from megatron_camopd.errors import ConfigurationError
from tests.support.hostile_checkpoints import SPOILED, Touch
from tests.support.saved_runs import STEPS, save_run
from tests.support.worlds import World, prepare, refusal

Spoil = Callable[[Path, Path], None]


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("flag", ["load", "general_teacher_load", "domain_teacher_load"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_checkpoint_that_runs_code_is_refused(
    flag: str, dry_run: bool, spoil: Spoil, world: World, tmp_path: Path
) -> None:
    hostile, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(world.student, hostile)
    spoil(hostile / "release", marker)
    line = refusal(world.flags(save=tmp_path / "run", dry_run=dry_run or None, **{flag: hostile}))
    assert line.startswith(f"--{flag.replace('_', '-')} {hostile}: its checkpoint cannot be read (")
    assert "system, which no checkpoint of Megatron holds" in line
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_run_that_resumes_runs_no_code(spoil: Spoil, world: World, tmp_path: Path) -> None:
    run, marker = save_run(world, tmp_path / "run"), tmp_path / "marker"
    assert prepare(world.flags(save=run))[0].resume
    key = {"key": "common_state/shard_0_1"} if spoil is SPOILED["entry"] else {}
    spoil(run / f"iter_{STEPS:07d}", marker, **key)
    line = refusal(world.flags(save=run))
    assert line.startswith(f"--save {run}: its checkpoint cannot be read (") and "system, which no checkpoint" in line
    assert not marker.exists()


def test_the_exporter_runs_no_code(world: World, tmp_path: Path) -> None:
    hostile, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(world.student, hostile)
    SPOILED["index"](hostile / "release", marker)
    with pytest.raises(ConfigurationError, match=r"\.metadata: "):
        export_hf(hostile, tmp_path / "hf")
    assert not marker.exists() and not (tmp_path / "hf").exists()


def test_arguments_of_checkpoints_in_the_older_format(world: World, tmp_path: Path) -> None:
    """Earlier versions of Megatron kept what is not sharded in a file of its own; some checkpoints state nothing."""
    older, marker = tmp_path / "release", tmp_path / "marker"
    shutil.copytree(world.student / "release", older)
    stated = saved_arguments(older)
    assert stated["hidden_size"] > 0
    metadata = pickle.loads((older / ".metadata").read_bytes())
    metadata.storage_data = {
        index: place for index, place in metadata.storage_data.items() if not index.fqn.startswith("common_state/")
    }
    (older / ".metadata").write_bytes(pickle.dumps(metadata))
    assert saved_arguments(older) == {}
    torch.save({"args": Namespace(hidden_size=48, code=Touch(marker)), "iteration": 1}, older / "common.pt")
    assert saved_arguments(older)["hidden_size"] == 48 and not marker.exists()
    (older / "common.pt").write_bytes(b"PK")
    with pytest.raises(ConfigurationError, match="its arguments cannot be read"):
        saved_arguments(older)


HARMLESS: list[Any] = [
    {"a": [1, 2.5, "x", None, True], "b": (1, {2, 3})}, Namespace(x=torch.bfloat16, y=torch.Size([2, 3])),
    numpy.random.get_state(), torch.device("cpu"), Path("a/b"),
]  # fmt: skip


@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: type(value).__name__)
def test_what_checkpoints_hold_is_read(value: Any) -> None:
    found = RestrictedUnpickler(io.BytesIO(pickle.dumps(value))).load()
    assert pickle.dumps(found) == pickle.dumps(value)


class Reduced:
    """A pickle that calls something with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "value",
    [Reduced(eval, "1"), Reduced(exec, "1"), Reduced(getattr, "x", "upper"), Reduced(__import__, "os"),
     Reduced(torch.load, "x"), Reduced(torch.hub.load, "x"), Reduced(pickle.loads, b"")],
    ids=["eval", "exec", "getattr", "import", "torch.load", "hub", "pickle"],
)  # fmt: skip
def test_functions_are_not_found(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint of Megatron holds"):
        RestrictedUnpickler(io.BytesIO(pickle.dumps(value))).load()


@pytest.mark.parametrize("name", ["megatron.core.transformer.enums", "megatron.core.utils"])
def test_of_megatron_enumerations_alone(name: str) -> None:
    classes = {"megatron.core.transformer.enums": "AttnBackend", "megatron.core.utils": "unwrap_model"}
    text = b"c" + name.encode() + b"\n" + classes[name].encode() + b"\n."
    if name.endswith("enums"):
        assert RestrictedUnpickler(io.BytesIO(text)).load().__name__ == "AttnBackend"
    else:
        with pytest.raises(pickle.UnpicklingError, match="unwrap_model"):
            RestrictedUnpickler(io.BytesIO(text)).load()


def test_torch_load_is_restricted_within_and_itself_after(tmp_path: Path) -> None:
    marker, before = tmp_path / "marker", torch.load
    torch.save([Touch(marker)], tmp_path / "hostile.pt")
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError, match="system"):
        torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert torch.load is before and not marker.exists()
    torch.save([{"x": torch.arange(3)}], tmp_path / "sound.pt")
    with restricted_unpickling():
        (found,) = torch.load(tmp_path / "sound.pt", weights_only=False)
    assert found["x"].tolist() == [0, 1, 2]
