"""Checkpoints of runs that did nothing but draw prompts: what a resumed plan reads."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_camopd.checkpoint.assets import assets_dir, copy_assets
from megatron_camopd.checkpoint.directory import TRACKER
from tests.support.worlds import World, prepare

STEPS = 4  # that the saved run has done


def save_run(world: World, save: Path, **changes: Any) -> Path:
    """Write the checkpoint that a run with these flags would have after :data:`STEPS` steps, without weights."""
    args, plan = prepare(world.flags(save=save, **changes))
    for _ in range(STEPS - 1):
        plan.streams[0].next(args.global_batch_size)
    plan.streams[1].next(args.global_batch_size)
    args.camopd_state = json.dumps({**plan.state_dict(), "skipped_in_a_row": 0})
    save_common_state(save, STEPS, args)
    copy_assets(assets_dir(args.load), assets_dir(save))
    return save


def save_common_state(save: Path, step: int, args: Any) -> None:
    """Megatron's torch_dist checkpoint of ``args`` alone, and the tracker."""
    from megatron.core import dist_checkpointing

    folder = save / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    rendezvous = save.parent / f"rendezvous-{save.name}"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    try:
        dist_checkpointing.save({"args": args, "checkpoint_version": 3.0, "iteration": step}, str(folder))
    finally:
        dist.destroy_process_group()
    (save / TRACKER).write_text(str(step))
