"""Hugging Face folders that are not what they should be: one line that names the file, whatever its bytes are."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_camopd.checkpoint.hf_folder import INDEX, SINGLE, HFFolder, NewTensor, read_header, write_shard
from megatron_camopd.errors import ConfigurationError


def raw(header: Any, body: bytes = b"\0" * 48) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line
    return line


@pytest.mark.parametrize(
    "content",
    [
        b"", b"abc", struct.pack("<Q", 2**60) + b"{}", raw([1]), raw("text"), raw(b'{"a":' * 100_000), raw(b"\xff\xfe"),
        raw({"x": entry([4, 3], 0, 48, ["F32"])}), raw({"x": entry([4, 3], 0, 48, {"F32": 1})}),
        raw({"x": entry([4, 3], 0, 48, "F99")}), raw({"x": entry([4, 3], 0, 40)}), raw({"x": 3}),
        raw({"x": entry([4, 3], 0, 48)}, b"\0" * 47), raw({"x": entry([4, 3], 0, 48)}, b"\0" * 49),
        raw({"x": entry([2, 3], 0, 24), "y": entry([3, 3], 12, 48)}), raw({"x": entry([-1, 3], 0, 48)}),
        raw({"x": entry([2**63, 3], 0, 48)}), raw({"x": entry([4, 3], 48, 0)}),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    line = refusal(path)
    assert "cannot be read (" in line and line.endswith("expected a complete safetensors file")


def test_files_that_are_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").endswith("no such file; expected a safetensors shard")
    assert refusal(tmp_path).endswith("is no regular file; expected a safetensors shard")
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo").endswith("is no regular file; expected a safetensors shard")
    (tmp_path / "f64").write_bytes(raw({"x": entry([6], 0, 48, "F64")}))
    assert refusal(tmp_path / "f64").endswith("tensor x has dtype F64; expected BF16 or F32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_says_whose_tensor_counts(folder: Path) -> None:
    """Both shards hold b: the one that the index names is read, whatever the order of their names."""
    save_file({"a": torch.zeros(2), "b": torch.full((2,), 1.0)}, folder / "one.safetensors")
    save_file({"b": torch.full((2,), 2.0)}, folder / "two.safetensors")
    for owner, value in (("one.safetensors", 1.0), ("two.safetensors", 2.0)):
        write_index(folder, {"a": "one.safetensors", "b": owner})
        assert HFFolder(folder, flag="--hf-path").read("b").tolist() == [value] * 2


def test_a_shard_must_hold_what_the_index_says(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(ConfigurationError, match=r"one.safetensors: lacks tensor b; model.safetensors.index.json says"):
        HFFolder(folder, flag="--hf-path")


def test_a_file_beside_an_index_of_others_is_ambiguous(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"a": torch.ones(2)}, folder / SINGLE)
    write_index(folder, {"a": "one.safetensors"})
    with pytest.raises(
        ConfigurationError, match="holds model.safetensors and model.safetensors.index.json, which does"
    ):
        HFFolder(folder, flag="--hf-path")
    write_index(folder, {"a": SINGLE})
    assert HFFolder(folder, flag="--hf-path").read("a").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "content", ["[]", "3", '"x"', "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000]
)
def test_an_index_of_another_shape(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    words = "is damaged|weight_map leaves|holds a JSON|cannot be read"
    with pytest.raises(ConfigurationError, match=rf"model.safetensors.index.json: ({words})"):
        HFFolder(folder, flag="--hf-path")


def test_an_index_that_leaves_the_folder(folder: Path) -> None:
    write_index(folder, {"a": "../one.safetensors"})
    with pytest.raises(ConfigurationError, match="weight_map leaves the folder; expected plain file names"):
        HFFolder(folder, flag="--hf-path")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_as_they_were_written(folder: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(7, 5).to(dtype)
    tensors = [NewTensor("m", dtype, (7, 5)), NewTensor("v", dtype, (3,)), NewTensor("none", dtype, (0, 4))]
    values = {"m": matrix, "v": matrix[0, :3], "none": matrix.new_zeros(0, 4)}
    write_shard(folder / SINGLE, tensors, row_blocks=lambda tensor: iter([values[tensor.name]]))
    read = HFFolder(folder, flag="--hf-path").read
    for start, stop in ((0, None), (2, 4), (6, 99), (7, None)):
        assert torch.equal(read("m", start=start, stop=stop), matrix[start:stop])
    assert torch.equal(read("v"), values["v"]) and read("none").shape == (0, 4)


@pytest.mark.parametrize("kept", [0, 8, 500, 40_000, 39_999_999])
def test_a_shard_cut_short_after_its_header_was_read(folder: Path, kept: int) -> None:
    """Reading a file that is mapped would end the process by SIGBUS, without a word."""
    path = folder / SINGLE
    save_file({"a": torch.arange(10_000_000.0), "b": torch.zeros(3)}, path)
    found = HFFolder(folder, flag="--hf-path")
    os.truncate(path, kept)
    for name, start, stop in (("a", 0, None), ("a", 9_000_000, 9_000_005), ("b", 0, 2)):
        with pytest.raises(ConfigurationError, match="model.safetensors: changed while it was read; leave"):
            found.read(name, start=start, stop=stop)


def test_a_shard_that_becomes_another(folder: Path) -> None:
    path = folder / SINGLE
    save_file({"a": torch.zeros(4)}, path)
    found = HFFolder(folder, flag="--hf-path")
    assert found.read("a").tolist() == [0.0] * 4
    save_file({"a": torch.ones(4)}, folder / "other")
    os.replace(folder / "other", path)
    with pytest.raises(ConfigurationError, match="changed while it was read"):
        found.read("a")
    path.unlink()
    with pytest.raises(ConfigurationError, match=r"model.safetensors: cannot be read \(No such file or directory\)"):
        found.read("a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_library(folder: Path, dtype: torch.dtype) -> None:
    """Whole tensors and slices of every length, also beyond the end, from a file with several tensors."""
    tensors = {
        "matrix": torch.randn(7, 5).to(dtype), "vector": torch.randn(6).to(dtype),
        "box": torch.randn(3, 2, 4).to(dtype), "scalar": torch.tensor(2.5, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }  # fmt: skip
    save_file(tensors, folder / SINGLE, metadata={"format": "pt", "note": "x" * 1000})
    found = HFFolder(folder, flag="--hf-path")
    for name, tensor in tensors.items():
        assert torch.equal(found.read(name), tensor)
        for start in range(len(tensor) if tensor.dim() else 0):
            for stop in range(start, len(tensor) + 3):
                assert torch.equal(found.read(name, start=start, stop=stop), tensor[start:stop])
