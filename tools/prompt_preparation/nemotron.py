"""General prompts: a sample of Nemotron-Post-Training-Dataset-v1 in the proportions of its five splits.

The prompt is the first user message of a row, with the tool schema of its metadata if it has one; system messages,
responses and everything else are left out. Rows whose user message is blank or "-" (all of ``code`` is published so)
get their prompt from its original source (``withheld``), or are counted and never sampled. ``selection`` documents how
a split is sampled.

After a file (on the hub: a shard) of a split the state may be saved beside the output. A command that was interrupted
continues after the last file in the saved state, and the result is the same byte for byte. Each split has its own
state: after an error about one split, a command with other flags for it does not read the others again.
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

from megatron_camopd.config.program import cleaned_up
from megatron_camopd.config.words import check_file
from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.output import OutputSet
from tools.prompt_preparation.selection import Sample, priority
from tools.prompt_preparation.sources import Row, RowSource, open_rows
from tools.prompt_preparation.withheld import WithheldPrompts

HUB = "nvidia/Nemotron-Post-Training-Dataset-v1"
# Rows of each split according to the data set's card.
OFFICIAL = {"chat": 746_622, "code": 1_896_395, "math": 2_044_407, "stem": 20_662_167, "tool_calling": 310_051}
_PREFIXES = {"tool_calling": ("tool_calling", "tool")}  # its files are called tool-*
_STATE = ".partial.state.json"
_SECONDS_BETWEEN_STATES = 20.0
_UNUSABLE = ("without a user message", "blank or -", "too long")
_JOINS = ("--prompts-by-uuid", "--code-questions")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-command."""
    parser.add_argument("--source", default=HUB, help="folder of its files, or its name on the hub (default)")
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="prompts in all (default: 10000)")
    parser.add_argument("--files-per-split", type=int, metavar="N",
                        help="read only so many files of each split, chosen by --seed (default: all)")  # fmt: skip
    parser.add_argument("--quota", action="append", default=[], metavar="SPLIT=N",
                        help="prompts of one split, against its proportion; 0 leaves it out")  # fmt: skip
    parser.add_argument("--code-questions", nargs="+", default=[], metavar="NAME=SOURCE",
                        help="data sets that the questions of code rows are joined from: taco, apps, code_contests, "
                        "codeforces (folder of its files, or its name on the hub)")  # fmt: skip
    parser.add_argument("--prompts-by-uuid", type=Path, metavar="FILE",
                        help='prompts of other rows without one: rows of "uuid" and "prompt"')  # fmt: skip


def quotas(count: int) -> dict[str, int]:
    """Divide ``count`` over the splits in the official proportions, by largest remainder (ties: the first split)."""
    total = sum(OFFICIAL.values())
    whole = {split: count * rows // total for split, rows in OFFICIAL.items()}
    by_remainder = sorted(OFFICIAL, key=lambda split: -(count * OFFICIAL[split] % total))
    for split in by_remainder[: count - sum(whole.values())]:
        whole[split] += 1
    return whole


def wanted_prompts(count: int, changes: Sequence[str]) -> dict[str, int]:
    """Return :func:`quotas` with the changes of ``--quota``, without splits of 0 prompts.

    Raises:
        ConfigurationError: A change is not SPLIT=N, or no prompts are left.
    """
    wanted = quotas(count)
    for change in changes:
        split, _, number = change.partition("=")
        if split not in OFFICIAL or not number.isdecimal():
            raise ConfigurationError(f"--quota {change}: must be SPLIT=N with a SPLIT of {', '.join(OFFICIAL)}")
        wanted[split] = int(number)
    wanted = {split: quota for split, quota in wanted.items() if quota}
    if not wanted:
        raise ConfigurationError("--quota: leaves no prompts at all")
    return wanted


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Sample and write ``prompts.jsonl``; return the counts.

    Raises:
        ConfigurationError: A flag, a source or the output is wrong.
    """
    if args.count < 1 or (args.files_per_split is not None and args.files_per_split < 1):
        flag, value = ("--count", args.count) if args.count < 1 else ("--files-per-split", args.files_per_split)
        raise ConfigurationError(f"{flag} {value}: must be at least 1")
    wanted = wanted_prompts(args.count, args.quota)
    withheld = WithheldPrompts(args.code_questions, args.prompts_by_uuid)
    parts = {split: _parts(args, split) for split in wanted}
    identity = {
        "command": "nemotron", "prompts": wanted, "seed": args.seed, "max_characters": args.max_characters,
        "files_per_split": args.files_per_split, "withheld": withheld.describe(),
        "sources": {split: [part.describe() for part in chosen] for split, chosen in parts.items()},
    }  # fmt: skip
    with OutputSet(args.output, overwrite=args.overwrite) as output:
        if output.is_current(identity):
            return {"up to date": str(args.output), **output.manifest["counts"]}
        sampler = Sampler(identity, withheld, args.output / _STATE)
        for split, chosen in parts.items():
            sampler.read(split, chosen)
            sampler.save()
            _check_enough(args, split, sampler.counts()[split])
        counts = sampler.counts()
        rows = [row for split in wanted for row in sampler.samples[split].items()]
        output.write_rows("prompts.jsonl", rows)
        output.finish({"counts": counts, "row_ids": [row["id"] for row in rows]})
        (args.output / _STATE).unlink(missing_ok=True)
    return counts


def _check_enough(args: argparse.Namespace, split: str, found: dict[str, int]) -> None:
    """Check that a split has as many prompts as are asked for.

    Raises:
        ConfigurationError: It has fewer.
    """
    if found["sampled"] == found["asked for"]:
        return
    passed = ", ".join(f"{found[reason]} {reason}" for reason in _UNUSABLE if reason in found)
    blank = f"their prompts from elsewhere ({_JOINS[split == 'code']}), " if found.get("blank or -") else ""
    raise ConfigurationError(
        f"--source {args.source}: split {split} has {found['sampled']} distinct usable prompts in {found['rows']} "
        f"rows ({passed or 'all usable'}), {found['asked for']} are asked for; give {blank}more files, a smaller "
        f"--count, or --quota {split}={found['sampled']}"
    )


def _parts(args: argparse.Namespace, split: str) -> list[RowSource]:
    """Return the files of a split that are to be read, as sources of their own."""
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
    """One sample for each split, with a saved state from which a later command continues.

    Args:
        identity: Settings and inputs of the whole output; those that concern a split are saved with its state.
        withheld: Prompts of rows that have none of their own.
        state: File of the saved state.
    """

    def __init__(self, identity: dict[str, Any], withheld: WithheldPrompts, state: Path) -> None:
        self._identity, self._withheld, self._state = identity, withheld, state
        self._wanted: dict[str, int] = identity["prompts"]
        self.samples = {split: Sample(quota) for split, quota in self._wanted.items()}
        self.seen = {split: Counter[str]() for split in self._wanted}
        self._done: dict[str, int] = dict.fromkeys(self._wanted, 0)  # finished parts
        self._saved = time.monotonic()
        self._resume()

    def read(self, split: str, parts: Sequence[RowSource]) -> None:
        """Read the parts of ``split`` that have not been read yet."""
        first = self._done[split]
        with tqdm(
            desc=split, unit=" rows", unit_scale=True, initial=self.seen[split]["rows"],
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        ) as bar:  # fmt: skip
            for number, part in enumerate(parts[first:], start=first + 1):
                bar.set_postfix_str(f"file {number} of {len(parts)}, {len(self.samples[split])} sampled", refresh=False)
                for row in part:
                    self._take(split, row)
                    bar.update()
                self._done[split] = number
                if time.monotonic() - self._saved > _SECONDS_BETWEEN_STATES:
                    self.save()

    def _take(self, split: str, row: Row) -> None:
        """Count a row, and offer its prompt to the sample of its split."""
        seen = self.seen[split]
        seen["rows"] += 1
        text = user_prompt(row.values["messages"])
        if text is None:
            seen["without a user message"] += 1
            return
        if _is_blank(text):
            found = self._withheld.find(split, row.values.get("uuid"), row.values.get("metadata"))
            if found is None or _is_blank(found):
                seen["blank or -"] += 1
                return
            text = found
            seen["joined"] += 1
        limit = self._identity["max_characters"]
        if limit is not None and len(text) > limit:
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
        self.samples[split].offer(priority(self._identity["seed"], split, text, written), identity, prompt)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return for each split: rows read, quota, rows skipped by reason, duplicates seen, prompts sampled."""
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
        """Save the state after the parts that were read completely."""
        state = {
            split: {
                "identity": self._identity_of(split), "done": self._done[split], "seen": self.seen[split],
                "sample": sample.state_dict(),
            }
            for split, sample in self.samples.items()
        }  # fmt: skip
        temporary = self._state.with_name(f"{self._state.name}.{os.getpid()}")
        try:
            with cleaned_up(lambda: temporary.unlink(missing_ok=True)):
                temporary.write_text(json.dumps(state), encoding="utf-8")
                os.replace(temporary, self._state)
        except OSError as error:
            raise ConfigurationError(f"--output: {self._state} cannot be written ({error.strerror})") from None
        self._saved = time.monotonic()

    def _resume(self) -> None:
        """Load the saved state of every split whose settings and inputs are the same."""
        check_file("--output", self._state, "the saved state of an interrupted command")
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # no state, or an incomplete one: begin anew
            return
        for split, saved in state.items() if isinstance(state, dict) else ():
            if split in self.samples and saved["identity"] == self._identity_of(split):
                self._done[split], self.seen[split] = saved["done"], Counter(saved["seen"])
                self.samples[split].load_state_dict(saved["sample"])

    def _identity_of(self, split: str) -> dict[str, Any]:
        """Return the settings and inputs that the sample of one split depends on, in the form read back from JSON."""
        found = {
            "prompts": self._wanted[split], "seed": self._identity["seed"], "source": self._identity["sources"][split],
            "max_characters": self._identity["max_characters"], "withheld": self._withheld.describe(split),
        }  # fmt: skip
        return json.loads(json.dumps(found))


def _is_blank(text: str) -> bool:
    """Return whether a user message holds no prompt."""
    return text.strip() in ("", "-")


def user_prompt(messages: Any) -> str | None:
    """Return the text of the first user message, None if there is none."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            return content if isinstance(content, str) else None
    return None


def tool_schema(metadata: Any) -> list[dict[str, Any]] | None:
    """Return the ``tools`` of a row's metadata, either of which may be a JSON text.

    Returns None if there are none, or if they are not valid JSON or cannot be encoded in UTF-8.
    """
    try:
        found = json.loads(metadata) if isinstance(metadata, str) else metadata
        tools = found.get("tools") if isinstance(found, dict) else None
        tools = json.loads(tools) if isinstance(tools, str) else tools
        json.dumps(tools, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair could not be written later
    except (ValueError, RecursionError):
        return None
    return tools if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools) else None
