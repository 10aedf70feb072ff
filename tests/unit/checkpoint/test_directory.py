"""Which checkpoint of a directory counts: the tracker's, or the newest complete one where the tracker is no help."""

from pathlib import Path

import pytest

from megatron_camopd.checkpoint.directory import (
    TRACKER,
    CheckpointLocation,
    find_checkpoint,
    repair_tracker,
    require_checkpoint,
)
from megatron_camopd.errors import ConfigurationError


def add(root: Path, *names: str, without: str = "") -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        for file in {".metadata", "metadata.json"} - {without}:
            (root / name / file).touch()


def iteration_in(root: Path) -> int | None:
    found = find_checkpoint(root)
    assert found is not None and found.directory == root
    return found.iteration


def test_tracker_decides(tmp_path: Path) -> None:
    add(tmp_path, "iter_0000002", "iter_0000010", "iter_12345678", "release")
    for text, iteration in (("2", 2), ("10\n", 10), ("12345678", 12345678), ("release", None)):
        (tmp_path / TRACKER).write_text(text)
        assert iteration_in(tmp_path) == iteration
        assert require_checkpoint("--load", tmp_path).iteration == iteration


def test_folders() -> None:
    root = Path("/x")
    assert CheckpointLocation(root, 10).folder == root / "iter_0000010"
    assert CheckpointLocation(root, 12345678).folder == root / "iter_12345678"
    assert CheckpointLocation(root, None).folder == root / "release"


@pytest.mark.parametrize("missing", [".metadata", "metadata.json"])
@pytest.mark.parametrize("text", ["30", "", "rel", "\N{SUPERSCRIPT TWO}", "-1", "31"])
def test_newest_complete_one_otherwise(missing: str, text: str, tmp_path: Path) -> None:
    add(tmp_path, "iter_0000002", "iter_0000010", "iter_12", "iter_0000020.old")
    add(tmp_path, "iter_0000030", without=missing)
    (tmp_path / TRACKER).write_text(text, encoding="utf-8")
    assert iteration_in(tmp_path) == 10


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoint(tmp_path) is None
    add(tmp_path, "iter_0000002", without=".metadata")
    assert find_checkpoint(tmp_path) is None
    (tmp_path / TRACKER).write_text("2")
    assert find_checkpoint(tmp_path) is None
    (tmp_path / TRACKER).write_text("release")
    assert find_checkpoint(tmp_path) is None


def test_a_complete_one_counts_without_tracker(tmp_path: Path) -> None:
    """The kill came between the last file of the first checkpoint and the tracker, or somebody removed the tracker."""
    add(tmp_path, "iter_0000002")
    assert iteration_in(tmp_path) == 2
    add(tmp_path, "iter_0000004", "release")
    assert iteration_in(tmp_path) == 4


def test_some_are_passed_over(tmp_path: Path) -> None:
    add(tmp_path, "iter_0000002", "iter_0000004", "iter_0000006")
    (tmp_path / TRACKER).write_text("4")
    for without, expected in (((), 4), ((6,), 4), ((4,), 2), ((4, 6), 2)):
        found = find_checkpoint(tmp_path, without=without)
        assert found is not None and found.iteration == expected
    assert find_checkpoint(tmp_path, without=(2, 4, 6)) is None


def test_tracker_is_repaired_once(tmp_path: Path) -> None:
    add(tmp_path, "iter_0000002")
    tracker = tmp_path / TRACKER
    for content in (None, b"\xff", b"", b"7"):
        tracker.unlink(missing_ok=True)
        if content is not None:
            tracker.write_bytes(content)
        found = find_checkpoint(tmp_path)
        assert found is not None
        repair_tracker(found)
        assert tracker.read_text() == "2"
        before = tracker.stat().st_ino
        repair_tracker(found)
        assert tracker.stat().st_ino == before  # a right one is not written again
        assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000002"}


def test_required_one_is_explained(tmp_path: Path) -> None:
    def explanation(folder: Path) -> str:
        with pytest.raises(ConfigurationError) as caught:
            require_checkpoint("--load", folder)
        return str(caught.value)

    nowhere = tmp_path / "nowhere"
    assert explanation(nowhere) == f"--load {nowhere}: no such folder; expected a Megatron checkpoint directory"
    assert explanation(tmp_path).endswith(f"expected {TRACKER} and the folder it names")
    (tmp_path / "config.json").touch()
    assert explanation(tmp_path).endswith("convert it with checkpoints_convert/hf_to_megatron.py first")
    add(tmp_path, "iter_0000002")
    (tmp_path / TRACKER).write_text("3")
    assert explanation(tmp_path) == (
        f"--load {tmp_path}: {TRACKER} says '3', but the newest complete checkpoint is iter_0000002; "
        "write 2 into the file"
    )
