"""The small files that make weights usable: config.json, tokenizer, chat template, generation config.

Every checkpoint directory (the one holding ``latest_checkpointed_iteration.txt``) keeps them in ``hf/``: the importer
puts them there, each ``--save`` of a training run copies them on, the exporter puts them back beside the weights.
So a checkpoint needs neither the original folder nor a network to be trained, sampled or exported.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_camopd.checkpoint.json_files import read_json_object
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.families.architecture import Architecture
from megatron_camopd.families.family import Family
from megatron_camopd.families.registry import family_of

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# config.json comes last: a folder that has it has everything else.
ASSET_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    GENERATION_CONFIG,
    CONFIG,
)
TOKENIZER_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a tokenizer needs at least one."""
_CONFIGS = (GENERATION_CONFIG, CONFIG)
_MORE_TEMPLATES = "additional_chat_templates"


def assets_dir(checkpoint_dir: str | os.PathLike[str]) -> Path:
    """The folder of a Megatron checkpoint directory that holds its Hugging Face files."""
    return Path(checkpoint_dir) / "hf"


def copy_assets(src_dir: str | os.PathLike[str], dst_dir: str | os.PathLike[str]) -> None:
    """Copy tokenizer, chat templates and configs of ``src_dir`` into ``dst_dir``, which is made if absent.

    Each file appears whole (temporary name, then rename), and files already there are replaced: calling it again, or
    after an interruption, is safe. One process calls it. Copying a folder onto itself does nothing.

    Raises:
        ConfigurationError: ``src_dir`` has no config.json, or ``dst_dir`` cannot be written.
    """
    source, target = Path(src_dir), Path(dst_dir)
    if not (source / CONFIG).is_file():
        raise ConfigurationError(f"{source}: has no {CONFIG}; expected a Hugging Face folder, or hf/ of a checkpoint")
    if target.exists() and source.samefile(target):
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in asset_files(source):
            (target / name).parent.mkdir(exist_ok=True)
            partial = target / f".{Path(name).name}.partial-{os.getpid()}"
            shutil.copyfile(source / name, partial)
            os.replace(partial, target / name)
    except OSError as error:
        raise ConfigurationError(
            f"{target}: cannot be written ({error.strerror}); expected a writable folder for tokenizer and config"
        ) from error


def asset_files(folder: Path) -> list[str]:
    """Return the names of the small files in ``folder``, relative to it; config.json is the last."""
    return [name for name in (*_named_templates(folder), *ASSET_FILES) if (folder / name).is_file()]


def _named_templates(folder: Path) -> list[str]:
    """Return the files of further chat templates by name, which transformers keeps in a folder of their own."""
    return sorted(str(path.relative_to(folder)) for path in (folder / _MORE_TEMPLATES).glob("*.jinja"))


def has_tokenizer(folder: Path) -> bool:
    """Return whether ``folder`` holds at least one file of a tokenizer."""
    return bool(_named_templates(folder)) or any((folder / name).exists() for name in set(ASSET_FILES) - set(_CONFIGS))


def check_files(folder: Path) -> None:
    """Check that what lies in a Hugging Face ``folder`` are files that can be opened without waiting.

    Libraries open files of their own choice there, and a FIFO among them would stop them for ever.

    Raises:
        ConfigurationError: A file is a FIFO, socket or device, or one of the model's small files is a folder or a link
            to nothing; the line names it.
    """
    for path in sorted([*folder.iterdir(), *(folder / _MORE_TEMPLATES).glob("*")]):
        if not path.is_file() and (path.name in ASSET_FILES or (path.exists() and not path.is_dir())):
            raise ConfigurationError(f"{path}: is no file; expected the model's {path.relative_to(folder)}")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse ``folder``/config.json.

    Raises:
        ConfigurationError: the file is absent or no JSON object; the line names it.
    """
    return read_json_object(Path(folder) / CONFIG, "the model's config.json")


def read_model(folder: str | os.PathLike[str]) -> tuple[Family, Architecture]:
    """Return the family and the architecture of the model that ``folder``/config.json describes.

    Raises:
        ConfigurationError: The file is absent or damaged, or describes a model that is not supported.
    """
    config, source = read_config(folder), str(Path(folder) / CONFIG)
    family = family_of(config, source=source)
    return family, family.read_architecture(config, source=source)


def run_assets(args: Namespace) -> Path:
    """Return the folder of the student's small files: in ``--save`` if the run resumes, else in ``--load``."""
    return assets_dir(args.save if args.resume else args.load)
