"""The demo's specialist is what the SFT stage makes: ``make_specialist.sh`` leads to the committed model again.

The first loss is one forward pass, equal to rounding; later ones have gone through Adam, which amplifies rounding, so
they and the weights get room for another CPU's kernels.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.processes import ENVIRONMENT, ROOT, run_command

TINY = ROOT / "examples" / "tiny_cpu"
LOSSES = {0: 10.13156, 59: 0.03537}  # seen when the committed model was made
VALIDATION = {19: 0.4878, 39: 0.0495, 59: 0.0349}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> Path:
    output = tmp_path_factory.mktemp("specialist") / "sft"
    for name, value in (ENVIRONMENT | {"OUTPUT": str(output), "NPROC": "1"}).items():
        monkeypatch_module.setenv(name, value)
    log = output.with_suffix(".log")
    status = run_command(["bash", str(TINY / "make_specialist.sh")], log=log, time_limit=400)
    assert status == 0, log.read_text()[-3000:]
    return output


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_losses_are_those_that_were_seen(made: Path) -> None:
    records = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(60))
    assert records[0]["loss"] == pytest.approx(LOSSES[0], rel=1e-4)
    assert records[59]["loss"] == pytest.approx(LOSSES[59], rel=0.1)
    found = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    assert found == pytest.approx(VALIDATION, rel=0.1)


def test_the_model_is_the_committed_one(made: Path) -> None:
    found = load_file(made / "specialist" / "model.safetensors")
    committed = load_file(TINY / "models" / "specialist" / "model.safetensors")
    general = load_file(TINY / "models" / "general" / "model.safetensors")
    assert found.keys() == committed.keys()
    for name in committed:
        moved = (committed[name] - general[name]).norm()
        assert (found[name] - committed[name]).norm() < 0.05 * moved, name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (made / "specialist" / name).read_text() == (TINY / "models" / "specialist" / name).read_text()
