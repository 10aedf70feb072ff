"""Load the tokenizer of a Hugging Face folder or a Megatron checkpoint, and the ids that end a response."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_camopd.checkpoint.assets import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_VOCABULARIES,
    assets_dir,
    check_files,
    read_model,
)
from megatron_camopd.checkpoint.json_files import read_json_object
from megatron_camopd.errors import ConfigurationError

_NO_LIMIT = 10**30  # what transformers itself takes for a tokenizer without a limit
_SAMPLE = "Hello world,  3 + 4 = 7.\n\tif x: return 'caf\u00e9'\n \u4e2d\u6587 \U0001f642\n"
"""Words, numbers, several spaces, line ends and other scripts: texts that tokenizers cut differently."""


def load_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that travels with the Megatron checkpoint directory ``checkpoint``.

    Raises:
        ConfigurationError: See :func:`load_folder_tokenizer`.
    """
    return load_folder_tokenizer(assets_dir(checkpoint))


def load_folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the Hugging Face folder ``folder``, and check that it is the model's.

    Raises:
        ConfigurationError: The files are missing or damaged, or the tokenizer that tokenizer_config.json makes encodes
            text differently than tokenizer.json, or the tokenizer has ids that the model does not have.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_VOCABULARIES):
        names = ", ".join(TOKENIZER_VOCABULARIES)
        raise ConfigurationError(f"{folder}: has none of {names}; expected the model's tokenizer")
    check_files(folder)
    try:
        # model_max_length: transformers warns of texts that are longer, but lengths are checked and counted here.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=_NO_LIMIT)
        largest = max(tokenizer.get_vocab().values())
        own = tokenizer.encode(_SAMPLE, add_special_tokens=False)
        raw = _raw_ids(folder / "tokenizer.json")
    except Exception as error:  # damaged files raise KeyError, AttributeError, plain Exception and others
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigurationError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {reason}); expected files that "
            "the installed transformers reads"
        ) from error
    if raw is not None and own != raw:
        place = next((i for i, (one, other) in enumerate(zip(own, raw, strict=False)) if one != other), len(own))
        raise ConfigurationError(
            f"{folder}: {type(tokenizer).__name__}, made by tokenizer_config.json, encodes a text otherwise than "
            f"tokenizer.json, from its token {place + 1} on; expected the same ids: look at tokenizer_class and "
            "the other fields of tokenizer_config.json"
        )
    _, architecture = read_model(folder)
    if largest >= architecture.vocab_size:
        raise ConfigurationError(
            f"{folder}: its tokenizer has the id {largest}, the model has ids 0 to {architecture.vocab_size - 1}; "
            "expected the tokenizer of the model"
        )
    return tokenizer


def _raw_ids(path: Path) -> list[int] | None:
    """Return the ids of the sample text by ``tokenizer.json`` alone, or None if there is no such file."""
    if not path.is_file():
        return None
    return list(PreTrainedTokenizerFast(tokenizer_file=str(path)).encode(_SAMPLE, add_special_tokens=False))


def end_of_sequence_ids(checkpoint: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a response, in ascending order; see :func:`end_of_sequence`."""
    return end_of_sequence(checkpoint, tokenizer)[0]


def end_of_sequence(checkpoint: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Return the ids that end a response, in ascending order, and the file that names them.

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
    return sorted(set(found)), str(path if path != folder else folder / "tokenizer_config.json")
