"""General prompts: a sample of Nemotron-Post-Training-Dataset-v1 in the proportions of its five splits.

The first user message of a row is the prompt, with the tool schema of its metadata where there is one; system messages,
answers and everything else stay out. Rows whose user message is blank or "-" (their text has to be joined from other
data sets) are counted and never sampled. How a split is sampled: ``selection``.

After every file (hub: shard) of a split the state may be written beside the output; a command that was interrupted goes
on behind the last file of it, and the result is the same byte for byte.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.output import OutputSet
from tools.prompt_preparation.selection import Sample, priority
from tools.prompt_preparation.sources import Row, RowSource, open_rows

HUB = "nvidia/Nemotron-Post-Training-Dataset-v1"
# Rows of each split, as the data set's card states them.
OFFICIAL = {"chat": 746_622, "code": 1_896_395, "math": 2_044_407, "stem": 20_662_167, "tool_calling": 310_051}
_PREFIXES = {"tool_calling": ("tool_calling", "tool")}  # its files are called tool-*
_STATE = ".partial.state.json"
_SECONDS_BETWEEN_STATES = 20.0
_UNUSABLE = ("without a user message", "blank or -", "too long")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", default=HUB, help="folder of its files, or its name on the hub (default)")
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="prompts in all (default: 10000)")
    parser.add_argument("--files-per-split", type=int, metavar="N",
                        help="read only so many files of each split, chosen by --seed (default: all)")  # fmt: skip


def quotas(count: int) -> dict[str, int]:
    """Prompts of each split: ``count`` in the official proportions, by largest remainder (ties: the first split)."""
    total = sum(OFFICIAL.values())
    whole = {split: count * rows // total for split, rows in OFFICIAL.items()}
    by_remainder = sorted(OFFICIAL, key=lambda split: -(count * OFFICIAL[split] % total))
    for split in by_remainder[: count - sum(whole.values())]:
        whole[split] += 1
    return whole


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Sample and write ``prompts.jsonl``; returns the counts. Errors: ConfigurationError."""
    if args.count < 1 or (args.files_per_split is not None and args.files_per_split < 1):
        flag, value = ("--count", args.count) if args.count < 1 else ("--files-per-split", args.files_per_split)
        raise ConfigurationError(f"{flag} {value}: must be at least 1")
    wanted = {split: quota for split, quota in quotas(args.count).items() if quota}
    parts = {split: _parts(args, split) for split in wanted}
    identity = {
        "command": "nemotron", "count": args.count, "seed": args.seed, "max_characters": args.max_characters,
        "files_per_split": args.files_per_split,
        "sources": {split: [part.describe() for part in chosen] for split, chosen in parts.items()},
    }  # fmt: skip
    with OutputSet(args.output, overwrite=args.overwrite) as output:
        if output.is_current(identity):
            return {"up to date": str(args.output), **output.manifest["counts"]}
        sampler = Sampler(wanted, args.seed, args.max_characters, args.output / _STATE, identity)
        for split, chosen in parts.items():
            sampler.read(split, chosen)
        counts = sampler.counts()
        for split, quota in wanted.items():
            found = counts[split]
            if found["sampled"] < quota:
                passed = ", ".join(f"{found[reason]} {reason}" for reason in _UNUSABLE if reason in found)
                raise ConfigurationError(
                    f"--source {args.source}: split {split} has {found['sampled']} distinct usable prompts in "
                    f"{found['rows']} rows ({passed or 'all usable'}), {quota} are asked for; give a smaller --count "
                    "or more files"
                )
        rows = [row for split in wanted for row in sampler.samples[split].items()]
        output.write_rows("prompts.jsonl", rows)
        output.finish({"counts": counts, "row_ids": [row["id"] for row in rows]})
        (args.output / _STATE).unlink(missing_ok=True)
    return counts


def _parts(args: argparse.Namespace, split: str) -> list[RowSource]:
    """The files of a split that are read."""
    source = open_rows(
        args.source, flag="--source", columns=("messages",), optional=("uuid", "metadata"), split=split,
        prefixes=_PREFIXES.get(split, (split,)), revision=args.revision,
    )  # fmt: skip
    parts = list(source.parts())
    if args.files_per_split is not None and args.files_per_split < len(parts):
        drawn = sorted(range(len(parts)), key=lambda number: priority(args.seed, f"files of {split}", str(number)))
        parts = [parts[number] for number in sorted(drawn[: args.files_per_split])]
    return parts


class Sampler:
    """One sample for each split, with the state that a later command goes on from."""

    def __init__(
        self, wanted: dict[str, int], seed: int, max_characters: int | None, state: Path, identity: dict[str, Any]
    ) -> None:
        self._wanted, self._seed, self._max_characters = wanted, seed, max_characters
        self._state, self._identity = state, json.loads(json.dumps(identity))
        self.samples = {split: Sample(quota) for split, quota in wanted.items()}
        self.seen = {split: Counter[str]() for split in wanted}
        self._done: dict[str, int] = dict.fromkeys(wanted, 0)  # finished parts
        self._saved = time.monotonic()
        self._resume()

    def read(self, split: str, parts: Sequence[RowSource]) -> None:
        """Read the parts of ``split`` that are not done."""
        first = self._done[split]
        bar = tqdm(
            desc=split, unit=" rows", unit_scale=True, initial=self.seen[split]["rows"],
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )  # fmt: skip
        for number, part in enumerate(parts[first:], start=first + 1):
            bar.set_postfix_str(f"file {number} of {len(parts)}", refresh=False)
            for row in part:
                self._take(split, row)
                bar.update()
            self._done[split] = number
            if time.monotonic() - self._saved > _SECONDS_BETWEEN_STATES:
                self.save()
        bar.close()

    def _take(self, split: str, row: Row) -> None:
        seen = self.seen[split]
        seen["rows"] += 1
        text = user_prompt(row.values["messages"])
        if text is None or text.strip() in ("", "-"):
            seen["without a user message" if text is None else "blank or -"] += 1
            return
        if self._max_characters is not None and len(text) > self._max_characters:
            seen["too long"] += 1
            return
        tools = tool_schema(row.values.get("metadata"))
        if tools is None and split == "tool_calling":
            seen["kept without a tool schema"] += 1
        identity = str(row.values.get("uuid") or row.id)
        prompt: dict[str, Any] = {
            "id": f"{split}-{identity}", "messages": [{"role": "user", "content": text}], "category": split,
        }  # fmt: skip
        if tools:
            prompt["tools"] = tools
        written = json.dumps(tools, sort_keys=True)
        self.samples[split].offer(priority(self._seed, split, text, written), identity, prompt)

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each split: rows read, quota, rows passed over by reason, duplicates seen, prompts sampled."""
        return {
            split: {
                "asked for": self._wanted[split],
                **dict(sorted(self.seen[split].items())),
                "duplicates of kept prompts": sample.duplicates,
                "sampled": len(sample),
            }
            for split, sample in self.samples.items()
        }

    def save(self) -> None:
        """Write the state of the finished parts."""
        state = {
            "identity": self._identity,
            "splits": {
                split: {"done": self._done[split], "seen": self.seen[split], "sample": sample.state_dict()}
                for split, sample in self.samples.items()
            },
        }
        temporary = self._state.with_name(f"{self._state.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(state), encoding="utf-8")
            os.replace(temporary, self._state)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ConfigurationError(f"--output: {self._state} cannot be written ({error.strerror})") from None
        self._saved = time.monotonic()

    def _resume(self) -> None:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or cut short: begin again
            return
        if not isinstance(state, dict) or state.get("identity") != self._identity:
            return
        for split, saved in state["splits"].items():
            self._done[split], self.seen[split] = saved["done"], Counter(saved["seen"])
            self.samples[split].load_state_dict(saved["sample"])


def user_prompt(messages: Any) -> str | None:
    """The first user message's text; None where there is none."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            return content if isinstance(content, str) else None
    return None


def tool_schema(metadata: Any) -> list[dict[str, Any]] | None:
    """The ``tools`` of a row's metadata (a JSON text), itself a list or a JSON text.

    None where there are none, or what is there is no JSON or no text that UTF-8 can hold.
    """
    try:
        found = json.loads(metadata) if isinstance(metadata, str) else metadata
        tools = found.get("tools") if isinstance(found, dict) else None
        tools = json.loads(tools) if isinstance(tools, str) else tools
        json.dumps(tools, ensure_ascii=False).encode("utf-8")  # half a surrogate pair would end the whole command
    except (ValueError, RecursionError):
        return None
    return tools if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools) else None
