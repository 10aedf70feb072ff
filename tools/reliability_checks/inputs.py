"""Malformed inputs: each must be refused in one line with status 2, or passed over with a warning, and change nothing.

The inputs are made at random from a table of kinds, all of them wrong. Each command runs in a process of its own,
forked from a server that has imported everything, under a time limit.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_camopd.checkpoint.checksums import SUMS

ROOT = Path(__file__).resolve().parents[2]
TRAIN, IMPORT = ROOT / "pretrain_camopd.py", ROOT / "checkpoints_convert" / "hf_to_megatron.py"
_TIME_LIMIT = 120.0


@dataclass(frozen=True)
class Material:
    """Sound inputs to spoil.

    Attributes:
        hf: A Hugging Face folder of the model.
        model: A Megatron checkpoint directory of it.
        run: The folder of a run with several checkpoints.
        prompts: A JSONL file of prompts.
        flags: Flags with which that run was made, by flag.
    """

    hf: Path
    model: Path
    run: Path
    prompts: Path
    flags: dict[str, str]


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        what: What is wrong with it.
        command: Script and flags that meet it.
        outcome: "refused", or "passed over".
    """

    what: str
    command: tuple[str, ...]
    outcome: str = "refused"


@dataclass
class Report:
    """Outcome of all cases: how many of each kind, and what was not as it should be."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


Kind = Callable[[Material, Path, random.Random], Case]


def run_inputs(material: Material, count: int, work: Path, *, seed: int) -> Report:
    """Try ``count`` malformed inputs, of all kinds in turn."""
    report, names = Report(), list(KINDS)
    for number in tqdm(range(count), unit=" inputs"):
        kind = names[number % len(names)]
        folder = work / "case"
        folder.mkdir(parents=True)
        case = KINDS[kind](material, folder, random.Random(f"{seed} {number}"))
        problem = judge(case, folder)
        report.counts[kind] += 1
        if problem is not None:
            report.problems.append(f"{kind} {number} ({case.what}): {problem}")
        shutil.rmtree(folder)
    return report


def judge(case: Case, folder: Path) -> str | None:
    """Run the command of a case and return what it did wrong, or None."""
    before = _content(folder)
    status, out, error = _run(case.command)
    if _content(folder) != before:
        changed = sorted(set(_content(folder).items()) ^ set(before.items()))
        return f"left behind or changed: {', '.join(name for name, _ in changed[:4])}"
    if case.outcome == "passed over":
        return None if status == 0 and "going on from" in out else f"status {status}, {out[-300:]!r} {error[-300:]!r}"
    lines = [line for line in error.splitlines() if line.strip()]
    if status != 2 or len(lines) != 1:
        return f"status {status}, {len(lines)} lines: {error[-400:]!r}"
    return None


def _content(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of everything in a folder, without opening what may block."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns if path.is_file() else 0)
    return found


def _run(command: Sequence[str]) -> tuple[int | None, str, str]:
    """Run a script in a process of its own; status (None: it took too long), stdout and stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.reliability_checks.preload"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(command, theirs))
    process.start()
    theirs.close()
    result: tuple[int | None, str, str] = (None, "", f"no end within {_TIME_LIMIT:.0f} s")
    if ours.poll(_TIME_LIMIT):
        try:
            result = ours.recv()
        except EOFError:
            process.join()
            result = (process.exitcode, "", "")
    if process.is_alive():
        process.kill()
    process.join()
    return result


def _child(command: Sequence[str], results: Any) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = list(command)
    status: Any = 1
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_path(command[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
    results.send((status, out.getvalue(), error.getvalue()))


def _train(material: Material, folder: Path, *extra: str, **changes: str) -> tuple[str, ...]:
    flags = {**material.flags, "--save": str(folder / "save")}
    flags |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words = [word for flag, value in flags.items() for word in (flag, value)]
    return (str(TRAIN), *words, *extra, "--dry-run")


# Kinds ----------------------------------------------------------------------------------------------------------


def _spoil_file(path: Path, chosen: random.Random) -> str:
    """Damage a file and return how."""
    data = bytearray(path.read_bytes())
    how = chosen.choice(["bit", "zeros", "cut", "longer", "missing", "empty", "folder"])
    place = chosen.randrange(len(data))
    if how == "bit":
        data[place] ^= 1 << chosen.randrange(8)
    elif how == "zeros":
        place = next(index for index in range(len(data)) if data[(place + index) % len(data)]) + place
        data[place % len(data)] = 0
    elif how == "cut":
        del data[place:]
    elif how == "longer":
        data += chosen.randbytes(chosen.randrange(1, 100))
    elif how == "empty":
        data.clear()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(data)
    return f"{path.name}: {how} at {place}"


def _damaged_model(material: Material, folder: Path, chosen: random.Random) -> Case:
    copy = Path(shutil.copytree(material.model, folder / "model"))
    flag = chosen.choice(["load", "general_teacher_load", "domain_teacher_load"])
    what = _spoil_file(chosen.choice([path for path in (copy / "release").iterdir() if path.name != SUMS]), chosen)
    return Case(f"{flag} {what}", _train(material, folder, **{flag: str(copy)}))


def _damaged_run(material: Material, folder: Path, chosen: random.Random) -> Case:
    copy = Path(shutil.copytree(material.run, folder / "save"))
    newest = max(copy.glob("iter_*"))
    what = _spoil_file(chosen.choice([path for path in newest.iterdir() if path.name.endswith(".distcp")]), chosen)
    return Case(what, _train(material, folder), "passed over")


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "vocab_size")  # fmt: skip
_NUMBERS = ("rms_norm_eps",)
_NO_SIZE = ["12", 0, -3, 1.5, [4], {}, True, float("inf"), float("nan"), 10**30, "x" * 5000]
_NO_NUMBER = ["1e-6", -1.0, float("inf"), float("nan"), [], {}, True, 0]


def _config_field(material: Material, folder: Path, chosen: random.Random) -> Case:
    copy = Path(shutil.copytree(material.hf, folder / "hf"))
    config = json.loads((copy / "config.json").read_text())
    name = chosen.choice([*_SIZES, *_NUMBERS, "model_type", "tie_word_embeddings"])
    values: dict[str, list[Any]] = {
        "model_type": [5, None, [], {}, "llama9"],
        "tie_word_embeddings": ["false", "yes", [], 3],
    }
    value = chosen.choice(values.get(name, _NO_SIZE if name in _SIZES else _NO_NUMBER))
    (copy / "config.json").write_text(json.dumps(config | {name: value}))
    return Case(f"{name} = {value!r:.40}", (str(IMPORT), "--hf-path", str(copy), "--save", str(folder / "out")))


_ODD_JSON = [b"", b"[]", b'"x"', b"1", b"null", b"{", b"\xff\xfe\x00", b'{"a": 1', b"[" * 100_000, b"\x00" * 50, b"{}x"]


def _odd_json(material: Material, folder: Path, chosen: random.Random) -> Case:
    content = chosen.choice(_ODD_JSON)
    name = chosen.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
    copy = Path(shutil.copytree(material.hf, folder / "hf"))
    path = copy / name
    header = len(content).to_bytes(8, "little") if name == "model.safetensors" else b""
    path.write_bytes(header + content)
    command = (str(IMPORT), "--hf-path", str(copy), "--save", str(folder / "out"))
    return Case(f"{name} = {content[:20]!r}", command)


_NO_ROWS = [
    b"no json", b"[1]", b'"x"', b"5", b"null", b"{}", b'{"prompt": 5}', b'{"prompt": " "}', b'{"messages": []}',
    b'{"messages": "x"}', b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": "alien", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": " "}]}', b'{"messages": [{"role": "user", "content": 5}]}',
    b'{"messages": [{"role": ["user"], "content": "x"}]}', b'{"messages": [[]]}',
    b'{"prompt": "a", "messages": [{"role": "user", "content": "x"}]}', b'{"prompt": "\\ud800"}',
    b'{"messages": [{"role": "assistant", "content": "x"}]}', b'{"prompt": "x", "tools": 5}',
    b'{"prompt": "x", "id": [1]}', b'{"prompt": "x", "branch": 5}', b'{"prompt": "x", "category": {}}',
    b'{"prompt": "\xff"}', b'{"prompt": ' + b"[" * 50_000, b'{"prompt": "x"', b'{"prompt": NaN}', b"\x00",
]  # fmt: skip


def _row(material: Material, folder: Path, chosen: random.Random) -> Case:
    lines = material.prompts.read_bytes().splitlines()[:200]
    place, row = chosen.randrange(len(lines)), chosen.choice(_NO_ROWS)
    lines[place] = row
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    flag = chosen.choice(["general_prompts", "domain_prompts"])
    return Case(f"line {place + 1} = {row[:60]!r}", _train(material, folder, **{flag: str(path)}))


_FLOATS = ("lr", "min-lr", "weight-decay", "clip-grad", "adam-beta1", "adam-beta2", "adam-eps", "rollout-temperature",
           "general-mass-target", "domain-mass-target", "general-feedback-scale", "domain-feedback-scale")  # fmt: skip
_INTEGERS = ("train-iters", "global-batch-size", "micro-batch-size", "max-prompt-length", "max-response-length",
             "recovery-steps", "max-skipped-steps", "lr-warmup-iters")  # fmt: skip


def _number(material: Material, folder: Path, chosen: random.Random) -> Case:
    name = chosen.choice([*_FLOATS, *_INTEGERS])
    values = (
        ["nan", "abc", "-7", "", "1e400", "0x", "--"] if name in _FLOATS else ["-7", "1.5", "abc", "", "nan", "1e9"]
    )
    value = chosen.choice(values)
    return Case(f"--{name}={value}", _train(material, folder, f"--{name}={value}"))


def _path(material: Material, folder: Path, chosen: random.Random) -> Case:
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "folder.jsonl").mkdir()
    odd = ["a\nb", "a\0b", "x" * 300, "y/" * 2100, "\x1b[31m", str(folder / "nowhere"), str(folder / "fifo.jsonl"),
           str(folder / "folder.jsonl"), "/dev/null", "/dev/zero", "/proc/self/mem"]  # fmt: skip
    flag = chosen.choice(["load", "general_teacher_load", "domain_teacher_load", "general_prompts", "domain_prompts"])
    value = chosen.choice(odd)
    return Case(f"{flag} = {value[:30]!r}", _train(material, folder, **{flag: value}))


KINDS: dict[str, Kind] = {
    "damaged model": _damaged_model,
    "damaged run": _damaged_run,
    "config field": _config_field,
    "odd JSON": _odd_json,
    "row": _row,
    "number": _number,
    "path": _path,
}
