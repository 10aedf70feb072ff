"""Load the tokenizer that travels with a Megatron checkpoint, and the ids that end a response."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_camopd.checkpoint.assets import CONFIG, GENERATION_CONFIG, assets_dir, read_model
from megatron_camopd.checkpoint.json_files import read_json_object
from megatron_camopd.errors import ConfigurationError


def load_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that travels with the Megatron checkpoint directory ``checkpoint``."""
    folder = assets_dir(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{folder}: no usable tokenizer ({reason}); convert the model again") from error


def end_of_sequence_ids(checkpoint: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a response, in ascending order.

    They are those of generation_config.json, else of config.json, else the tokenizer's.

    Raises:
        ConfigurationError: None of them names an id, a file is damaged, or an id is not one of the vocabulary.
    """
    folder = assets_dir(checkpoint)
    path, ids = folder / CONFIG, None
    for name in (GENERATION_CONFIG, CONFIG):
        if ids in (None, []) and (folder / name).exists():
            path = folder / name
            ids = read_json_object(path, f"the model's {name}").get("eos_token_id")
    if ids in (None, []):
        path, ids = folder, tokenizer.eos_token_id
    if ids is None:
        raise ConfigurationError(f"{path}: names no eos_token_id, nor does the tokenizer; responses could not end")
    _, architecture = read_model(folder)
    found = ids if isinstance(ids, list) else [ids]
    for value in found:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < architecture.vocab_size:
            raise ConfigurationError(
                f"{path}: eos_token_id holds {' '.join(repr(value)[:60].split())}; expected ids of the model, "
                f"0 to {architecture.vocab_size - 1}"
            )
    return sorted(set(found))
