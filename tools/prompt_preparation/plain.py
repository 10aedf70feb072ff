"""Prompts of any JSONL, JSON or Parquet file, with the names of its fields given on the command line.

A prompt is a text (``--prompt question``) or chat messages (``--messages conversations --role-field from
--content-field value``), whose trailing assistant turns are cut off. Duplicates are dropped and counted; the first row
with a text is kept. Memory: a hash for each distinct prompt, and the prompts of ``--count``; without ``--count`` rows
are written as they are read.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.output import OutputSet
from tools.prompt_preparation.selection import Sample, priority
from tools.prompt_preparation.sources import Row, RowSource, open_rows

ROLES = {"human": "user", "gpt": "assistant", "function": "tool"} | {
    role: role for role in ("system", "user", "assistant", "tool")
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-command."""
    parser.add_argument("--source", required=True, help="file, folder, pattern, or data set of the hub")
    parser.add_argument("--configuration", help="of the hub's data set")
    parser.add_argument("--split", help="of the hub's data set or folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="FIELD", help="field with the prompt's text")
    prompt.add_argument("--messages", metavar="FIELD", help="field with chat messages")
    parser.add_argument("--role-field", default="role", help="of a message (default: role; ShareGPT: from)")
    parser.add_argument("--content-field", default="content", help="of a message (default: content; ShareGPT: value)")
    parser.add_argument("--id", metavar="FIELD", help="field with the row's id (default: its place)")
    category = parser.add_mutually_exclusive_group()
    category.add_argument("--category", metavar="FIELD", help="field with the row's category")
    category.add_argument("--category-value", metavar="TEXT", help="one category for all rows")
    parser.add_argument("--tools", metavar="FIELD", help="field with tool schemas")
    parser.add_argument("--system", metavar="TEXT", help="system message put before every prompt")
    parser.add_argument("--count", type=int, metavar="N", help="a sample of so many rows (default: all)")


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write ``prompts.jsonl``; return the counts.

    Raises:
        ConfigurationError: A flag, the source or the output is wrong.
    """
    if args.count is not None and args.count < 1:
        raise ConfigurationError(f"--count {args.count}: must be at least 1")
    needed = [args.messages if args.prompt is None else args.prompt]
    fields = [name for name in (args.id, args.category, args.tools) if name]
    source = open_rows(
        args.source, flag="--source", columns=[*needed, *fields], split=args.split, name=args.configuration,
        revision=args.revision, progress="reading",
    )  # fmt: skip
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "overwrite")}
    with OutputSet(args.output, overwrite=args.overwrite) as output:
        if output.is_current({"settings": settings, "source": source.describe()}):
            return {"up to date": str(args.output), **output.manifest["counts"]}
        counts: Counter[str] = Counter()
        ids: list[str] = []
        output.write_rows("prompts.jsonl", _noted(_chosen(args, source, counts), ids, args, counts))
        counts["written"] = len(ids)
        output.finish({"counts": dict(counts), "row_ids": ids})
    return dict(counts)


def _chosen(args: argparse.Namespace, source: RowSource, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield all distinct prompts in the order of the source, or ``--count`` of them in the order of priority."""
    rows = _distinct(args, source, counts)
    if args.count is None:
        yield from rows
        return
    sample = Sample(args.count)
    for row in rows:
        sample.offer(priority(args.seed, "rows", _text(row)), row["id"], row)
    if len(sample) < args.count:
        raise ConfigurationError(
            f"--count {args.count}: {args.source} has {len(sample)} distinct usable prompts in "
            f"{counts['rows']} rows; ask for fewer"
        )
    yield from sample.items()


def _noted(
    rows: Iterator[dict[str, Any]], ids: list[str], args: argparse.Namespace, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows and append their ids to ``ids``.

    Raises:
        ConfigurationError: There are no rows.
    """
    for row in rows:
        ids.append(row["id"])
        yield row
    if not ids:
        raise ConfigurationError(f"--source {args.source}: not one of {counts['rows']} rows has a usable prompt")


def _distinct(args: argparse.Namespace, source: RowSource, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the prompt rows of the source, each text once; count the rows that are skipped."""
    seen: set[int] = set()
    for row in source:
        counts["rows"] += 1
        messages = _messages(args, row)
        asked = [message["content"] for message in messages if message["role"] != "system"]
        if not any(text.strip() for text in asked) or any(
            message["role"] == "user" and not message["content"].strip() for message in messages
        ):
            counts["without a prompt"] += 1
            continue
        if (
            args.max_characters is not None
            and sum(len(message["content"]) for message in messages) > args.max_characters
        ):
            counts["too long"] += 1
            continue
        given = row.values[args.id] if args.id else None
        prompt: dict[str, Any] = {"id": row.id if given is None else str(given), "messages": messages}
        category = args.category_value if args.category is None else row.values[args.category]
        if category is not None:
            prompt["category"] = str(category)
        if args.tools and row.values[args.tools]:
            prompt["tools"] = row.values[args.tools]
        try:
            key = priority(0, "", _text(prompt))
        except (TypeError, RecursionError):  # Parquet has dates, bytes and others
            reason = "has a value that JSON cannot hold; expected tool schemas"
            raise ConfigurationError(f"--tools {args.tools}: {row.where} {reason}") from None
        if key in seen:
            counts["duplicates"] += 1
            continue
        seen.add(key)
        yield prompt


def _messages(args: argparse.Namespace, row: Row) -> list[dict[str, str]]:
    """Return the row's chat messages without trailing assistant turns; [] if no prompt is left."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        text = row.values[args.prompt]
        return [*system, {"role": "user", "content": text if isinstance(text, str) else ""}]
    found = row.values[args.messages]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise ConfigurationError(f"--messages {args.messages}: {row.where} has no list of messages in that field")
    messages = []
    for message in found:
        role, content = message.get(args.role_field), message.get(args.content_field)
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise ConfigurationError(
                f"--messages {args.messages}: {row.where} has a message without a known {args.role_field!r} or text in "
                f"{args.content_field!r} (found: {', '.join(map(str, message))}); give --role-field and --content-field"
            )
        messages.append({"role": ROLES[role], "content": content})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return [*system, *messages] if messages else []


def _text(row: dict[str, Any]) -> str:
    """Return the text by which prompts are compared: messages and tools as JSON."""
    return json.dumps([row["messages"], row.get("tools")], sort_keys=True)
