"""Record of what a run started from: the student's checkpoint, and the small files that decide its texts.

A run saves these with every checkpoint. Until there is one, they lie in ``begun.json`` in its folder, together with the
settings: so a run that was killed before its first checkpoint starts again from its beginning, and another run does not
write over its records.
"""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_camopd.checkpoint.assets import asset_files, assets_dir, copy_assets, run_assets
from megatron_camopd.checkpoint.checksums import hash_files
from megatron_camopd.checkpoint.directory import require_checkpoint
from megatron_camopd.checkpoint.json_files import read_json_object
from megatron_camopd.errors import ConfigurationError

BEGUN = "begun.json"


def origin(args: Namespace, state: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the run started from, as JSON values, after a check that it is still there unchanged.

    Args:
        args: The validated arguments.
        state: The saved state of the run, or None if it is new.

    Returns:
        ``student``, the fingerprint of the checkpoint in ``--load`` at the start of the run, and ``assets``, the
        SHA-256 of tokenizer, template and configuration files by name.

    Raises:
        ConfigurationError: A file differs from that of the saved run, or a run without checkpoint yet was started with
            another student.
    """
    folder = run_assets(args)
    assets = hash_files(folder / name for name in asset_files(folder))
    saved: dict[str, Any] = {} if state is None else state.get("origin", {})
    if "assets" in saved:
        _check_assets(args, folder, assets, saved["assets"])
    if args.resume:
        return {"student": saved.get("student"), "assets": assets}
    student = require_checkpoint("--load", args.load).fingerprint()
    if saved.get("student", student) != student:
        raise ConfigurationError(
            f"--load {args.load}: is not the student that the run in --save {args.save} began with; give that one, or "
            "another --save to start a new run"
        )
    return {"student": student, "assets": assets}


def _check_assets(args: Namespace, folder: Path, found: dict[str, str], saved: dict[str, str]) -> None:
    for name in sorted(found.keys() | saved.keys()):
        if found.get(name) != saved.get(name):
            how = "is new" if name not in saved else "is missing" if name not in found else "was changed"
            raise ConfigurationError(
                f"{folder / name}: {how} since the run in --save {args.save} began; put it back as it was, or give "
                "another --save to start a new run"
            )


def read_begun(save: str, records: str) -> str | None:
    """Return the state of a run in ``save`` that has no checkpoint yet, as JSON text, or None if there is no run.

    Args:
        save: The folder of the run, without a checkpoint.
        records: Name of the file that a run writes there from its first step on.

    Raises:
        ConfigurationError: There are records of a run, but no state.
    """
    path = Path(save) / BEGUN
    if path.exists():
        return json.dumps(read_json_object(path, "the beginnings of a run"))
    if (Path(save) / records).exists():
        raise ConfigurationError(
            f"--save {save}: holds {records} of a run whose checkpoints are gone; restore them, or name a new folder"
        )
    return None


def bring_assets(args: Namespace) -> None:
    """Bring tokenizer, template and configuration of the student into ``--save``, as a run begins; one process does.

    What an earlier run left there, and this one's student does not have, is removed.

    Raises:
        ConfigurationError: ``--save`` cannot be written.
    """
    source, target = assets_dir(args.load), assets_dir(args.save)
    for name in set(asset_files(target)) - set(asset_files(source)):
        (target / name).unlink()
    copy_assets(source, target)


def note_begun(save: str, state: dict[str, Any]) -> None:
    """Write the state of a run that begins; one process calls it."""
    path = Path(save) / BEGUN
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{BEGUN}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def forget_begun(save: str) -> None:
    """Remove what :func:`note_begun` wrote, because there is a checkpoint now."""
    (Path(save) / BEGUN).unlink(missing_ok=True)
