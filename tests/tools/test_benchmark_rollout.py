"""The rollout benchmark without vLLM: its flags, its random models, a run of the native engine, its arithmetic.

What the tiny model's times are is not looked at; what is computed from times is, from known ones.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_camopd.runtime import accelerator
from tests.support.processes import run_ranks
from tools import benchmark_rollout
from tools.benchmark_report import NOT_MEASURED

accelerator.activate()  # before Megatron is imported

from megatron_camopd.families.registry import family_of  # noqa: E402
from megatron_camopd.runtime.startup import single_process_environment  # noqa: E402
from tools.rollout_benchmark import measure, report  # noqa: E402
from tools.rollout_benchmark.measure import Measurement, Result  # noqa: E402
from tools.rollout_benchmark.model import PRESETS  # noqa: E402

WORK = [
    "--preset", "tiny", "--repeats", "2", "--warmup", "0", "--rollout-batch-size", "3",
    "--global-batch-size", "4", "--max-prompt-length", "9", "--min-prompt-length", "5", "--max-response-length", "6",
]  # fmt: skip


def run_tool(folder: str, flags: list[str], environment: dict[str, str]) -> int:
    """On a rank: the whole tool, on a machine that has no vLLM."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "vllm" else find(name, package)
    os.environ.update(environment)
    return benchmark_rollout.main([*flags, "--json", f"{folder}/a.json", "--markdown", f"{folder}/a.md"])


def tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Return each Markdown table: first column -> column -> cell."""
    found: list[dict[str, dict[str, str]]] = []
    names: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line[:1] != "|":
            names = []
        elif not names:
            names = cells
            found.append({})
        elif not cells[0].startswith("--"):
            found[-1][cells[0]] = dict(zip(names, cells, strict=True))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_vllm_the_native_engine_is_measured(ranks: int, tmp_path: Path) -> None:
    address = single_process_environment()
    environment = {name: address[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    split = ["--tensor-model-parallel-size", "2"] if ranks == 2 else []
    assert run_ranks(run_tool, ranks, str(tmp_path), [*WORK, *split], environment) == [0] * ranks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]
    document, text = json.loads((tmp_path / "a.json").read_text()), (tmp_path / "a.md").read_text()

    found = document["measurement"]
    native, vllm = found["engines"]
    alone, *others = found["syncs"]
    assert found["response_tokens"] == 24 and 20 <= found["prompt_tokens"] <= 36
    assert found["model_bytes"] == 4 * parameters("tiny")
    assert len(native["seconds"]) == len(alone["seconds"]) == 2 and native["over_native"] == 1.0
    assert native["tokens_per_second"] == pytest.approx(24 / (sum(native["seconds"]) / 2))
    for entry in (vllm, *others):
        assert entry["status"] == "not installed" and not entry["seconds"] and entry["peak_extra_bytes"] is None
    assert document["layout"]["tensor_parallel"] == document["layout"]["processes"] == ranks
    assert document["dtype"] == "float32" and document["versions"]["torch"] == torch.__version__
    if ranks == 2:
        assert alone["peak_extra_bytes"] is None or alone["peak_extra_bytes"] > found["model_bytes"]  # is gathered

    engines, syncs = tables(text)
    assert engines["megatron"]["tokens/s"] == f"{native['tokens_per_second']:,.0f}"
    assert engines["vllm"]["tokens/s"] == syncs["sync"]["GB/s"] == NOT_MEASURED
    assert engines["vllm"]["remark"] == syncs["sync and probe"]["remark"] == "not installed"
    assert "Start of vLLM" not in text and f"TP {ranks}" in text


def test_flags_of_an_engine_that_is_missing_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "has_vllm", lambda: False)
    for name, value in single_process_environment().items():
        monkeypatch.setenv(name, value)
    assert benchmark_rollout.main(["--preset", "tiny", "--rollout-max-sequences=8"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("benchmark_rollout.py: error: --rollout-max-sequences: vllm is not installed")


def parameters(preset: str) -> int:
    family = family_of(PRESETS[preset].config)
    shapes = family.table.hf_shapes(family.read_architecture(PRESETS[preset].config))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_presets_have_the_published_sizes() -> None:
    assert set(PRESETS) == set(benchmark_rollout.PRESET_NAMES)
    # 0.6B and 4B as published: tied, counted once.
    assert parameters("qwen3-0.6b") == 596_049_920 and parameters("qwen3-4b") == 4_022_468_096
    assert PRESETS["tiny"].config["head_dim"] == 32


def test_rates_and_ratios_from_known_times() -> None:
    found = Measurement(
        model_bytes=8 * 2**20,
        prompt_tokens=7,
        response_tokens=600,
        engines=[Result("megatron", seconds=[3.0, 9.0, 4.0]), Result("vllm", seconds=[2.0, 1.0, 0.5])],
        syncs=[Result("weights alone", seconds=[0.5], peak_extra_bytes=2**20), Result("sync", "not installed")],
        vllm_start_seconds=8.25,
        first_sync_seconds=1.5,
    )
    entry = report.record(found)
    native, vllm = entry["engines"]
    assert (native["tokens_per_second"], vllm["tokens_per_second"], vllm["over_native"]) == (150.0, 600.0, 4.0)
    assert (native["median_seconds"], native["min_seconds"]) == (4.0, 3.0)
    alone, sync = entry["syncs"]
    assert (alone["bytes_per_second"], alone["peak_over_model"]) == (2**24, 0.125)
    assert sync["median_seconds"] is sync["bytes_per_second"] is sync["peak_over_model"] is None
    text = report.tables(document_of(entry))
    assert tables(text)[0]["vllm"] == {"engine": "vllm", "tokens/s": "600", "median s": "1.000", "min s": "0.500",
                                       "x native": "4.00"}  # fmt: skip
    assert "Start of vLLM: 8.2 s" in text and "1.5 s" in text


def document_of(measurement: dict[str, Any]) -> dict[str, Any]:
    shape = dict.fromkeys(
        ("processes", "tensor_parallel", "pipeline_parallel", "data_parallel", "rollout_tensor_parallel"), 1
    )
    work = {"prompts": 1, "shortest_prompt": 7, "longest_prompt": 7, "response_length": 600}
    return {
        "model": "m",
        "dtype": "float32",
        "layout": shape | {"vllm_engines": 1},
        "workload": work,
        "measurement": measurement,
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--load", "--preset", "required"]),
        (["--preset", "huge"], ["'huge'", "qwen3-4b"]),
        (["--preset", "tiny", "--load", "somewhere"], ["not allowed"]),
        (["--load", "no/such/folder"], ["--load no/such/folder", "no such folder"]),
        (["--preset", "tiny", "--rollout-engine", "vllm"], ["--rollout-engine", "drop"]),
        (["--preset", "tiny", "--save=somewhere"], ["--save", "drop"]),
        (["--preset", "tiny", "--repeats", "0"], ["--repeats 0", "at least 1"]),
        (["--preset", "tiny", "--min-prompt-length", "129"], ["129", "--max-prompt-length 128"]),
        (["--preset", "tiny", "--max-response-length", "5000"], ["4096 positions"]),
        (["--preset", "tiny", "--tensor-model-parallel-size", "2"], ["does not divide the 1 processes"]),
        (["--preset", "tiny", "--no-such-flag"], ["--no-such-flag"]),
        (["--preset", "tiny", "--json", "no/such/folder/a.json"], ["--json", "no/such/folder does not exist"]),
    ],
)
def test_bad_input_ends_with_one_line(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in single_process_environment().items():  # and put back afterwards
        monkeypatch.setenv(name, value)
    assert benchmark_rollout.main(flags) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1, output
    assert all(word in output.err for word in words), output.err
