"""Settings that a resumed run must keep, because they decide what its next step computes."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron_camopd.config.settings import Settings, flag_of
from megatron_camopd.errors import ConfigurationError

# Megatron's arguments that must be kept. Our own settings declare it with ``kept=True``.
_MEGATRON = (
    "global_batch_size", "seed", "optimizer", "lr", "min_lr", "lr_decay_style",
    "lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_init", "lr_decay_iters", "lr_wsd_decay_style",
    "lr_wsd_decay_iters", "decoupled_lr", "decoupled_min_lr", "weight_decay", "start_weight_decay", "end_weight_decay",
    "weight_decay_incr_style", "apply_wd_to_qk_layernorm", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps",
    "sgd_momentum", "attention_dropout", "hidden_dropout", "bf16", "fp16",
)  # fmt: skip


def kept_settings(args: Namespace, groups: Sequence[type[Settings]], further: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values that a resumed run must keep, by argument name.

    ``train_iters`` is among them if the length of a schedule follows from it. Otherwise a run may be continued to more
    steps.

    Args:
        args: The validated arguments.
        groups: The settings in use.
        further: Names of further Megatron arguments to keep.
    """
    names = [*(name for group in groups for name in group.kept_arguments()), *_MEGATRON, *further]
    settings = {name: getattr(args, name) for name in names}
    decays = args.lr_decay_style != "constant" or args.lr_warmup_fraction is not None
    if (decays and args.lr_decay_iters is None) or args.weight_decay_incr_style != "constant":
        settings["train_iters"] = args.train_iters
    return settings


def check_kept_settings(settings: dict[str, Any], saved: dict[str, Any], *, save: str) -> None:
    """Check that ``settings`` are those ``saved`` in the checkpoint in the directory ``save``.

    Raises:
        ConfigurationError: Names the first flag that differs.
    """
    # Compare the stage first: another stage has other settings, so any other difference would mislead.
    for name, value in sorted(settings.items(), key=lambda item: item[0] != "stage"):
        if name in saved and saved[name] != value:
            raise ConfigurationError(
                f"{flag_of(name)} is {value}, but the checkpoint in --save {save} was made with "
                f"{saved[name]}; use that, or another --save to start a new run"
            )
