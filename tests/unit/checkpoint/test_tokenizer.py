"""Tokenizers that cannot be loaded, that encode other than tokenizer.json, or that belong to another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_camopd.checkpoint.assets import copy_assets
from megatron_camopd.checkpoint.tokenizer import load_tokenizer
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import World, refusal


@pytest.fixture
def student(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.student, tmp_path / "student"))


def byte_level() -> Tokenizer:
    """A byte-level BPE without merges, in which a space is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def install(student: Path, tokenizer: Tokenizer, **config: Any) -> None:
    """Give the checkpoint ``tokenizer``, and its model a vocabulary that is large enough."""
    folder = student / "hf"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def enlarge(student: Path, size: int) -> None:
    path = student / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": size}))


def test_a_class_that_encodes_otherwise_is_refused(student: Path) -> None:
    install(student, byte_level())
    enlarge(student, 300)
    sound = load_tokenizer(student)
    assert sound.decode(sound.encode("a  b c")) == "a  b c"
    install(student, byte_level(), tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(
        ConfigurationError, match="hf: Llama.*, made by tokenizer_config.json, encodes a text otherwise"
    ):
        load_tokenizer(student)


def test_ids_beyond_the_model_are_refused(student: Path) -> None:
    install(student, byte_level())
    enlarge(student, 200)
    with pytest.raises(ConfigurationError, match="its tokenizer has the id 255, the model has ids 0 to 199; expected"):
        load_tokenizer(student)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "9.0", "model": {"type": "Newest", "vocab": {}}}'),
        ("tokenizer.json", "\x00\x01"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"extra_special_tokens": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": ["x"]}'),
    ],
)
def test_damaged_files_are_one_line(name: str, content: str, student: Path, world: World, tmp_path: Path) -> None:
    (student / "hf" / name).write_text(content)
    line = refusal(world.flags(save=tmp_path / "run", load=student))
    assert line.startswith(f"{student / 'hf'}: its tokenizer cannot be loaded (") and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named(student: Path, world: World, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (student / "hf" / name).unlink()
    line = refusal(world.flags(save=tmp_path / "run", load=student))
    assert line.startswith(f"{student / 'hf'}: has none of tokenizer.json, tokenizer.model, vocab.json; expected")


def test_chat_templates_by_name_travel_along(student: Path, tmp_path: Path) -> None:
    """Transformers keeps them in a folder; without it rows with tools would be rendered by another template."""
    tokenizer = load_tokenizer(student)
    tokenizer.chat_template = {"default": "{{ a }}", "tool_use": "{{ b }}"}
    tokenizer.save_pretrained(student / "hf")
    copy_assets(student / "hf", tmp_path / "copy" / "hf")
    assert load_tokenizer(tmp_path / "copy").chat_template == tokenizer.chat_template


def test_long_texts_are_encoded_without_a_warning(student: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The library would say that the model cannot take them; lengths are checked and counted by this program."""
    install(student, byte_level(), model_max_length=16)
    enlarge(student, 300)
    with caplog.at_level("WARNING"):
        assert len(load_tokenizer(student).encode("a" * 500)) == 500
    assert caplog.records == []
