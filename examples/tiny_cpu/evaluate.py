"""Score HF folders on the tiny world's held-out prompts: greedy generation with transformers, exact match.

This file does not use Megatron, so it also checks that an exported folder opens with ``AutoModelForCausalLM`` and has a
working tokenizer, chat template and generation configuration.

Prompts go through the folder's own chat template, are padded on the left, and are answered in large batches (the model
is tiny). A response is right if it equals the answer and then stops at one of the folder's end-of-sequence ids within
``world.MAX_NEW_TOKENS`` tokens.

Run::

    python examples/tiny_cpu/evaluate.py --eval-general F --eval-domain F \
        --model general_teacher=DIR --model specialist=DIR --model recovered=DIR --output scores.json

prints a table in percent (``--per-category``: with every task) and writes
``{"general_teacher": {"general": 0..1, "domain": 0..1}, ...}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import world
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout, without installing
from megatron_camopd.errors import ConfigurationError  # noqa: E402


def read_rows(path: Path, flag: str) -> list[dict[str, Any]]:
    """Read the rows ``{"messages", "answer", "category"}`` of an evaluation file.

    Raises:
        ConfigurationError: The file is missing or empty, or a row lacks one of the keys.
    """
    if not path.is_file():
        raise ConfigurationError(f"{flag}: no file {path}; write one with examples/tiny_cpu/world.py --output DIR")
    rows = []
    # Only a line feed ends a row; splitlines() would also cut at other separators, which texts may hold.
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    for number, line in enumerate(text.split("\n") if text else [], start=1):
        try:
            row = json.loads(line)
            _ = row["messages"], row["answer"], row["category"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{flag}: {path} line {number} is not a JSON object with messages, answer and category ({error!r})"
            ) from None
        rows.append(row)
    if not rows:
        raise ConfigurationError(f"{flag}: {path} is empty; at least one row is needed")
    return rows


def load_folder(folder: Path, flag: str) -> tuple[Any, Any]:
    """Load ``(model, tokenizer)`` of an HF folder: fp32, in evaluation mode, padding on the left.

    Raises:
        ConfigurationError: The folder, its config.json or its weights are missing.
    """
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{flag}: {folder} is not an HF model folder (no config.json in it)")
    if not any(folder.glob("*.safetensors")):
        raise ConfigurationError(f"{flag}: {folder} holds no weights (*.safetensors)")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, tokenizer


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, conversations: list[Any], *, batch_size: int = 256) -> list[tuple[str, bool]]:
    """Generate one response per list of messages, greedily: ``(text before end-of-sequence, whether it ended)``."""
    stop = model.generation_config.eos_token_id
    stop = set(stop) if isinstance(stop, list) else {stop}
    results = []
    for start in range(0, len(conversations), batch_size):
        batch = tokenizer.apply_chat_template(
            conversations[start : start + batch_size],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=world.MAX_NEW_TOKENS,
        )
        for response in output[:, batch["input_ids"].shape[1] :].tolist():
            length = next((index for index, token in enumerate(response) if token in stop), None)
            text = tokenizer.decode(response[:length], clean_up_tokenization_spaces=False)
            results.append((text, length is not None))
    return results


def score_rows(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the fraction of right responses per category, and over all rows under the key ``"all"``."""
    responses = complete(model, tokenizer, [row["messages"] for row in rows])
    right: dict[str, list[bool]] = defaultdict(list)
    for row, (text, ended) in zip(rows, responses, strict=True):
        correct = world.score(row["answer"], text, ended)
        right[row["category"]].append(correct)
        right["all"].append(correct)
    return {category: sum(marks) / len(marks) for category, marks in right.items()}


def format_table(results: dict[str, dict[str, dict[str, float]]], *, per_category: bool) -> str:
    """Format ``results[model][side][category]`` as a table: a row per model, a column per side, in percent."""
    sides = next(iter(results.values()))
    columns = [(side, "all", side) for side in sides]
    if per_category:
        columns += [(side, name, name) for side in sides for name in sides[side] if name != "all"]
    width = max(len("model"), *map(len, results)) + 2
    lines = ["model".ljust(width) + "".join(f"{title:>9}" for _, _, title in columns)]
    for model, scores in results.items():
        cells = "".join(f"{100 * scores[side][category]:9.1f}" for side, category, _ in columns)
        lines.append(model.ljust(width) + cells)
    return "\n".join(lines)


def write_scores(path: Path, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Write ``{model: {side: fraction}}`` as JSON, under a temporary name that is then changed to ``path``."""
    scores = {model: {side: values["all"] for side, values in sides.items()} for model, sides in results.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _named_folders(values: list[str]) -> dict[str, Path]:
    """Read the values NAME=DIR of ``--model``."""
    folders: dict[str, Path] = {}
    for value in values:
        name, separator, folder = value.partition("=")
        if not (name and separator and folder):
            raise ConfigurationError(f"--model {value}: expected NAME=DIR, for example recovered=output/recovered")
        if name in folders:
            raise ConfigurationError(f"--model {value}: the name {name} is given twice; names must differ")
        folders[name] = Path(folder)
    return folders


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description="Exact-match scores of HF folders on held-out tiny-world prompts.")
    parser.add_argument("--eval-general", type=Path, required=True, help="held-out general rows (eval_general.jsonl)")
    parser.add_argument("--eval-domain", type=Path, required=True, help="held-out domain rows (eval_domain.jsonl)")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="an HF folder; repeatable")
    parser.add_argument("--output", type=Path, help="where the scores go as JSON (default: only the table)")
    parser.add_argument("--per-category", action="store_true", help="a column for every task")
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        sides = {
            "general": read_rows(arguments.eval_general, "--eval-general"),
            "domain": read_rows(arguments.eval_domain, "--eval-domain"),
        }
        results = {}
        for name, folder in _named_folders(arguments.model).items():
            model, tokenizer = load_folder(folder, f"--model {name}")
            results[name] = {side: score_rows(model, tokenizer, rows) for side, rows in sides.items()}
    except ConfigurationError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    print(format_table(results, per_category=arguments.per_category))
    if arguments.output is not None:
        write_scores(arguments.output, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
