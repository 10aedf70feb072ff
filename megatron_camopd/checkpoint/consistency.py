"""Check that the configuration beside a checkpoint is that of its weights."""

from pathlib import Path

from megatron_camopd.checkpoint.assets import CONFIG, assets_dir, read_model
from megatron_camopd.checkpoint.torch_dist import saved_arguments
from megatron_camopd.errors import ConfigurationError


def check_config(folder: Path) -> None:
    """Check that ``hf/config.json`` beside a checkpoint folder states the architecture that the checkpoint states.

    Raises:
        ConfigurationError: It states another one; the line names the file.
    """
    assets = assets_dir(folder.parent)
    family, arch = read_model(assets)
    saved, stated = saved_arguments(folder), family.megatron_arguments(arch)
    for name in family.stated_arguments(arch):
        if saved.get(name) is not None and saved[name] != stated[name]:
            raise ConfigurationError(
                f"{assets / CONFIG}: {name.replace('_', '-')} is {stated[name]}, but the weights in {folder.name} were "
                f"made with {saved[name]}; put the model's own {CONFIG} back"
            )
