"""Load the tokenizer that travels with a Megatron checkpoint, and the ids that end a response."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_camopd.checkpoint.assets import assets_dir
from megatron_camopd.errors import ConfigurationError


def load_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that travels with the Megatron checkpoint directory ``checkpoint``."""
    folder = assets_dir(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{folder}: no usable tokenizer ({reason}); convert the model again") from error


def end_of_sequence_ids(checkpoint: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: those of generation_config.json, or else the tokenizer's."""
    path = assets_dir(checkpoint) / "generation_config.json"
    ids = None
    if path.is_file():
        try:
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"{path}: is no JSON object ({error}); convert the model again") from error
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ConfigurationError(f"{path}: names no eos_token_id, nor does the tokenizer; responses could not end")
    return sorted(ids) if isinstance(ids, list) else [ids]
