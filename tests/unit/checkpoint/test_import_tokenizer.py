"""The tokenizer at conversion: what the start of a run refuses is refused before weights are written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints_convert import hf_to_megatron
from megatron_camopd.checkpoint.export_hf import export_hf
from megatron_camopd.checkpoint.hf_folder import SINGLE
from megatron_camopd.checkpoint.import_hf import import_hf
from megatron_camopd.checkpoint.tokenizer import load_tokenizer
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import VOCABULARY, make_hf_model, make_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "source"))


def refusal(source: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        import_hf(source, source.parent / "target")
    line = str(caught.value)
    assert "\n" not in line and [path.name for path in source.parent.iterdir()] == ["source"]
    return line


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""), ("tokenizer.json", b"{"), ("tokenizer.json", b"\xff\x00"), ("tokenizer.json", b"17"),
        ("tokenizer.json", b'{"version": "2.0", "model": {"type": "Fresh"}}'), ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b'{"pad_token": 8}'), ("tokenizer_config.json", b'{"tokenizer_class": {"a": 1}}'),
        ("tokenizer_config.json", b"[" * 100_000),
    ],
)  # fmt: skip
def test_damaged_files(name: str, content: bytes, source: Path) -> None:
    (source / name).write_bytes(content)
    assert refusal(source).startswith(f"{source}: its tokenizer cannot be loaded (")


def test_tokenizers_of_other_models(source: Path) -> None:
    make_tokenizer(vocabulary=VOCABULARY | {"zz": 1000}).save_pretrained(source)
    assert refusal(source).startswith(f"{source}: its tokenizer has the id 1000, the model has ids 0 to 258; expected")
    make_tokenizer().save_pretrained(source)
    change(source / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    assert "encodes a text otherwise than tokenizer.json" in refusal(source)


def test_a_tokenizer_without_its_vocabulary(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    assert refusal(source).startswith(f"{source}: has none of tokenizer.json, tokenizer.model, vocab.json; expected")


def test_a_bare_model_is_converted_and_says_so(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hf_to_megatron.main(["--hf-path", str(source), "--save", str(source.parent / "whole")]) == 0
    assert capsys.readouterr().err == ""
    for name in TOKENIZER_FILES:
        (source / name).unlink(missing_ok=True)
    checkpoint = source.parent / "bare"
    assert hf_to_megatron.main(["--hf-path", str(source), "--save", str(checkpoint)]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"{source}: has no tokenizer; the checkpoint can be exported, but")
    with pytest.raises(ConfigurationError, match="expected the model's tokenizer"):
        load_tokenizer(checkpoint)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [fifo, folder, dangling])
@pytest.mark.parametrize("name", [*TOKENIZER_FILES, "config.json", "generation_config.json", "merges.txt"])
def test_small_files_that_are_no_files(make: Callable[[Path], None], name: str, source: Path) -> None:
    make(source / name)
    assert refusal(source).startswith(f"{source / name}: is no ")


@pytest.mark.parametrize(
    "name", [SINGLE, "model.safetensors.index.json", "adapter_config.json", "additional_chat_templates/a.jinja"]
)
def test_a_fifo_is_never_opened(name: str, source: Path) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    fifo(source / name)
    assert refusal(source) == f"{source / name}: is no file; expected the model's {name}"


def test_links_to_files_are_followed(source: Path) -> None:
    """As in the cache of the hub, where every file of a model is a link."""
    for path in sorted(source.iterdir()):
        path.rename(source.parent / path.name)
        path.symlink_to(source.parent / path.name)
    load_tokenizer(import_hf(source, source.parent / "target"))


def test_a_fifo_in_a_checkpoint_is_named(source: Path) -> None:
    checkpoint = import_hf(source, source.parent / "target")
    fifo(checkpoint / "hf" / "special_tokens_map.json")
    for read in (load_tokenizer, lambda folder: export_hf(folder, source.parent / "out")):
        with pytest.raises(ConfigurationError, match="hf/special_tokens_map.json: is no file"):
            read(checkpoint)
    assert {path.name for path in source.parent.iterdir()} == {"source", "target"}


def test_converters_load_no_megatron_and_transformers_where_used() -> None:
    program = (
        "import sys, megatron_camopd.checkpoint.import_hf, megatron_camopd.checkpoint.export_hf; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'megatron', 'transformers'}))"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.strip() == "[]"
