"""Weights that are not finite, or not in the dtype to write: refused by both converters, and nothing is left."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_camopd.checkpoint import import_hf as importer
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.finite import cast_finite, check_finite
from megatron_camopd.checkpoint.hf_folder import SINGLE
from megatron_camopd.checkpoint.import_hf import import_hf
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import make_hf_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, FINAL_NORM = "model.layers.1.input_layernorm.weight", "model.norm.weight"
QUERY, GATE, DOWN = (
    f"model.layers.{name}_proj.weight" for name in ("0.self_attn.q", "1.mlp.gate", "0.mlp.down")
)  # fmt: skip
CASES = [
    (EMBEDDING, (0, 0), math.nan), (EMBEDDING, (258, 31), math.inf), (HEAD, (130, 5), -math.inf),
    (HEAD, (258, 31), math.nan), (NORM, (31,), math.inf), (FINAL_NORM, (0,), math.nan), (QUERY, (17, 3), -math.inf),
    (GATE, (47, 31), math.nan), (DOWN, (31, 47), math.inf),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied float32 model."""
    return make_hf_model(tmp_path_factory.mktemp("hf") / "model", tie_word_embeddings=False)


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "source"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], dtype: torch.dtype) -> None:
    """Write all tensors anew in ``dtype``, after ``edit``."""
    with safe_open(folder / SINGLE, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118 - not a dict
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_names_file_tensor_and_place(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    for name, place, value in CASES:
        shutil.copy(source / SINGLE, tmp_path / "sound")

        def spoil(
            tensors: dict[str, torch.Tensor], name: str = name, place: tuple[int, ...] = place, value: float = value
        ) -> None:
            tensors[name][place] = value

        change(source, spoil, dtype)
        line = refusal(lambda: import_hf(source, tmp_path / "target"))
        assert line == (f"{source / SINGLE}: tensor {name} holds {value:g} at {list(place)}; expected finite weights")
        shutil.move(tmp_path / "sound", source / SINGLE)
        assert {path.name for path in tmp_path.iterdir()} == {"source"}
    import_hf(source, tmp_path / "target")


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, NORM, QUERY, DOWN])
def test_import_to_a_dtype_that_is_too_small(name: str, source: Path, tmp_path: Path) -> None:
    """The largest float32 numbers round to infinity in bfloat16, the largest of bfloat16 does not."""
    largest = torch.finfo(torch.bfloat16).max
    change(source, lambda tensors: tensors[name].view(-1)[-1:].fill_(-largest), torch.float32)
    import_hf(source, tmp_path / "fits", dtype=torch.bfloat16)
    change(source, lambda tensors: tensors[name].view(-1)[-1:].fill_(-3.4e38), torch.float32)
    line = refusal(lambda: import_hf(source, tmp_path / "target", dtype=torch.bfloat16))
    assert line.startswith(f"{source / SINGLE}: tensor {name} holds -3.4e+38 at [")
    assert "which bfloat16 (by --dtype) cannot hold" in line
    assert {path.name for path in tmp_path.iterdir()} == {"source", "fits"}
    import_hf(source, tmp_path / "kept")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An importer without the check, to make checkpoints as a run with a fault would."""
    monkeypatch.setattr(importer, "check_finite", lambda values, **_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_names_folder_and_tensor(source: Path, tmp_path: Path, dtype: torch.dtype, unchecked: None) -> None:
    for number, (name, place, value) in enumerate(CASES):
        shutil.copy(source / SINGLE, tmp_path / "sound")

        def spoil(
            tensors: dict[str, torch.Tensor], name: str = name, place: tuple[int, ...] = place, value: float = value
        ) -> None:
            tensors[name][place] = value

        change(source, spoil, dtype)
        checkpoint = import_hf(source, tmp_path / f"checkpoint{number}")
        line = refusal(lambda checkpoint=checkpoint: export_hf(checkpoint, tmp_path / "target"))  # type: ignore[misc]
        assert line.startswith(f"{checkpoint / 'release'}: tensor {name} (of ")
        assert line.endswith(f") holds {value:g} at {list(place)}; expected finite weights")
        shutil.rmtree(checkpoint)
        shutil.move(tmp_path / "sound", source / SINGLE)
        assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("name", [HEAD, FINAL_NORM, GATE])
def test_export_to_a_dtype_that_is_too_small(name: str, source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors[name].view(-1)[3:4].fill_(3.4e38), torch.float32)
    checkpoint = import_hf(source, tmp_path / "checkpoint")
    export_hf(checkpoint, tmp_path / "kept")
    config = checkpoint / "hf" / "config.json"
    values = json.loads(config.read_text())
    values.pop("torch_dtype", None)
    config.write_text(json.dumps(values | {"dtype": "bfloat16"}))
    line = refusal(lambda: export_hf(checkpoint, tmp_path / "target"))
    assert line.startswith(f"{checkpoint / 'release'}: tensor {name} (of ") and "holds 3.4e+38 at [" in line
    assert "which bfloat16 (by hf/config.json) cannot hold" in line
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint", "kept"}


def test_every_place_of_every_shape() -> None:
    """Lengths around the widths of vector registers, slices that are not contiguous, and no values at all."""
    check_finite(torch.empty(0, 3), where="x")
    with pytest.raises(ConfigurationError, match=r"x holds nan at \[\]"):
        check_finite(torch.tensor(math.nan), where="x")
    check_finite(torch.tensor(torch.finfo(torch.float32).max), where="x")
    for dtype in (torch.float32, torch.bfloat16):
        for length in (1, 7, 16, 33, 1000):
            for value in (math.nan, math.inf, -math.inf):
                for column in {0, length // 2, length - 1}:
                    matrix = torch.zeros(3, 2 * length, dtype=dtype)
                    matrix[2, 2 * column] = value
                    check_finite(matrix[:, 1::2], where="x")
                    with pytest.raises(ConfigurationError, match=rf"x holds {value:g} at \[12, {column}\]"):
                        check_finite(matrix[:, ::2], where="x", first_row=10)


def test_a_cast_that_fits_is_exact() -> None:
    values = torch.tensor([0.0, -1.5, 3.0e38], dtype=torch.bfloat16)
    assert torch.equal(cast_finite(values, torch.float32, where="x", reason="y"), values.float())
    assert cast_finite(values, torch.bfloat16, where="x", reason="y") is values
