"""The recipes' commands are accepted: every training step as a dry run for 32 processes, on stand-ins for its inputs.

The stand-ins have the real flags' sizes where flags depend on them (40,960 positions, heads that 4 divides). What
cannot be had without the network or GPUs, the downloads and the runs themselves, is not tested.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ENVIRONMENT, ROOT
from tests.support.worlds import make_checkpoint, write_prompts

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("recipes") / "work"
    sizes: dict[str, Any] = {"max_position_embeddings": 40960, "num_key_value_heads": 4, "intermediate_size": 64}
    for name in ("megatron/general", "megatron/specialist", "sft"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        make_checkpoint(work / name, **sizes)
    for name in ("general/prompts", "medical/prompts", "roleplay/heldout_prompts"):
        (work / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_prompts(work / "data" / f"{name}.jsonl", "x")
    conversation = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (work / "data" / "roleplay" / "sft.jsonl").write_text(conversation)
    return work


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(EXAMPLES / script), *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("script", "step", "lines"),
    [
        ("roleplay_qwen3_4b/run.sh", "distill", ["processes: 32 = tensor 2 x pipeline 1 x data 16, sequence parallel",
                                                 "90 general, 30 domain steps"]),
        ("medical_qwen3_8b/run.sh", "distill", ["processes: 32 = tensor 4 x pipeline 1 x data 8, sequence parallel",
                                                "512 prompts a step, 64 on a data-parallel rank; at most 64 micro",
                                                "at most 18,874,368 a step"]),
        ("roleplay_qwen3_4b/run.sh", "sft", ["64 rows of 16,384 tokens, 4 on a data-parallel rank in 4 microbatches"]),
    ],
)  # fmt: skip
def test_dry_runs(work: Path, script: str, step: str, lines: list[str]) -> None:
    before = sorted(work.rglob("*"))
    # The converted stand-in in sft/ has no steps to resume: the fine-tuning goes elsewhere.
    elsewhere = ["--save", str(work / "elsewhere")] if step == "sft" else []
    found = run(script, step, *elsewhere, DRY_RUN="32", WORK=str(work))
    assert found.returncode == 0, found.stderr[-2000:]
    assert [line for line in lines if line not in found.stdout] == [], found.stdout
    assert "dry run: nothing was started or written" in found.stdout
    assert sorted(work.rglob("*")) == before


def test_a_wrong_step_is_named() -> None:
    for script in ("roleplay_qwen3_4b/run.sh", "medical_qwen3_8b/run.sh"):
        found = run(script, "train")
        assert found.returncode == 2 and "no step is called train" in found.stderr


def test_scripts_are_sound() -> None:
    scripts = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
    assert len(scripts) >= 8
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
