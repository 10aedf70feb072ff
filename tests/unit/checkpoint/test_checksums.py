"""Checksums of checkpoint folders: the format of sha256sum, and every kind of damage found."""

import hashlib
import io
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_camopd.checkpoint.checksums import (
    SUMS,
    HashingFile,
    damaged_files,
    hash_files,
    read_checksums,
    write_checksums,
)

FILES = {".metadata": 3000, "__0_0.distcp": 9_000_001, "__1_0.distcp": 0, "metadata.json": 65}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000004"
    folder.mkdir()
    for seed, (name, size) in enumerate(FILES.items()):
        (folder / name).write_bytes(random.Random(seed).randbytes(size))
    write_checksums(folder, hash_files(folder.iterdir()))
    return folder


def test_the_format_is_that_of_sha256sum(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=True, capture_output=True)
    digests = read_checksums(folder)
    assert digests is not None and digests.keys() == FILES.keys()
    for name, digest in digests.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, SUMS])
    made = subprocess.run(["sha256sum", *FILES], cwd=folder, check=True, capture_output=True).stdout
    (folder / SUMS).write_bytes(made)
    assert read_checksums(folder) == digests
    assert damaged_files([folder]) == {}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "zeroed block": zero,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "folder": make_folder,
}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(damage: Callable[[Path], object], name: str, folder: Path) -> None:
    damage(folder / name)
    ((where, reason),) = damaged_files([folder]).items()
    assert where == 0 and reason.startswith(str(folder / name)) and "\n" not in reason


def test_an_empty_file_that_grew(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes(b"x")
    assert "__1_0.distcp is damaged" in damaged_files([folder])[0]


@pytest.mark.parametrize("text", [b"", b"\n", b"abc  x\n", b"\xff\xfe\n", b"0" * 64 + b"  ../x\n", b"0" * 64 + b" x\n"])
def test_damaged_checksums(text: bytes, folder: Path) -> None:
    (folder / SUMS).write_bytes(text)
    assert damaged_files([folder])[0].startswith(f"{folder / SUMS} cannot be read (")


@pytest.mark.parametrize("name", FILES)
def test_checksums_that_leave_a_file_out(name: str, folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    assert damaged_files([folder])[0] == f"{folder / SUMS} cannot be read (it has no line for {name})"


@pytest.mark.parametrize("name", ["__0_0.distcp", "fifo", ".."])
def test_what_is_no_regular_file_is_not_opened(name: str, folder: Path) -> None:
    with (folder / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n" if name != "__0_0.distcp" else "")
    if name != "..":
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert damaged_files([folder])[0] == f"{folder / name} is no regular file"


def test_checksums_that_are_no_file(folder: Path) -> None:
    (folder / SUMS).unlink()
    assert read_checksums(folder) is None and damaged_files([folder]) == {}
    os.mkfifo(folder / SUMS)
    assert "is no file" in damaged_files([folder])[0]


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_shares_cover_all_files_once(shares: int, folder: Path) -> None:
    other = Path(shutil.copytree(folder, folder.with_name("release")))
    flip(folder / "__0_0.distcp")
    flip(other / "metadata.json")
    found = [damaged_files([folder, other], share=share, shares=shares) for share in range(shares)]
    assert sorted(place for damage in found for place in damage) == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_a_file_is_hashed_while_it_is_written(seed: int, tmp_path: Path) -> None:
    random_ = random.Random(seed)
    blocks = [random_.randbytes(random_.choice((0, 1, 1000, 5_000_000, 1 << 22))) for _ in range(12)]
    digests: dict[str, str] = {}
    with HashingFile(tmp_path / "x", digests) as file:
        for block in blocks:
            assert file.write(memoryview(block)) == len(block)
        assert file.tell() == sum(map(len, blocks))
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
        file.flush()
        os.fsync(file.fileno())
    assert (tmp_path / "x").read_bytes() == b"".join(blocks)
    assert digests == {"x": hashlib.sha256(b"".join(blocks)).hexdigest()} == hash_files([tmp_path / "x"])
