"""Role-play data from CoSER's sharegpt file: the longest conversations held out as prompts, the others for SFT.

Conversations are ranked by their number of dialogue turns (human and assistant entries, without the human's
"===Conversation Start==="), ties by row. The prompt of a held-out conversation is everything before its last assistant
turn. Two kinds of conversations are left out and counted. Those in which no character speaks, unless
--keep-all-conversations is given: the assistant plays the environment or predicts the next speaker ("world model",
"environment" or "next speaker" in the system prompt, or responses that are all speaker names). And those that cannot be
used: without an assistant turn, with nothing before it, or with a blank turn.

The same scene appears once for each character: the same lines under another system prompt, with the roles of human and
assistant exchanged, and lines joined into one turn. So scenes are compared by utterances. An utterance is a line
without the speaker's name, reduced to letters and digits. A conversation that shares an utterance of at least 24
letters and digits with a held-out one counts as the same scene and stays out of the SFT set. This rule also drops a few
conversations of other scenes that quote the same line. At the end the written SFT file is searched for the held-out
texts themselves.
"""

import argparse
import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_camopd.data import ConversationSet
from megatron_camopd.errors import ConfigurationError
from tools.prompt_preparation.output import OutputSet
from tools.prompt_preparation.selection import normalized
from tools.prompt_preparation.sources import Row, RowSource, open_rows

HUB, HUB_FILE = "Neph0s/CoSER", "train/sft_conversations_sharegpt.json"
ROLES = {"system": "system", "human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant"}
_START = "===Conversation Start==="
_NO_CHARACTER = re.compile(r"world model|next speaker|who speaks next|you are (the )?environment", re.IGNORECASE)
_SPEAKER = re.compile(r"^\s*[^\s:][^:\n]{0,39}:\s+")
_NAME = re.compile(r"[^.!?:,\n]{1,40}")
_IDENTIFYING_LENGTH = 24  # an utterance of so many letters and digits is taken to identify its scene


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-command."""
    parser.add_argument("--source", default=HUB, help="sft_conversations_sharegpt.json, or the data set (default)")
    parser.add_argument("--held-out", type=int, default=10_000, metavar="N", help="prompts (default: 10000)")
    parser.add_argument("--keep-all-conversations", action="store_true", help="environment and speaker prediction too")


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write ``heldout_prompts.jsonl`` and ``sft.jsonl``; return the counts.

    Raises:
        ConfigurationError: A flag, the source or the output is wrong.
    """
    if args.held_out < 1:
        raise ConfigurationError(f"--held-out {args.held_out}: must be at least 1")
    file, revision = _local(args)
    options: dict[str, Any] = {"flag": "--source", "columns": ("conversations",)}
    source = open_rows(file, progress="ranking", **options)
    described = source.describe() | {"source": args.source, "revision": revision}
    identity = {
        "command": "coser", "held_out": args.held_out, "max_characters": args.max_characters,
        "keep_all": args.keep_all_conversations, "source": described,
    }  # fmt: skip
    with OutputSet(args.output, overwrite=args.overwrite) as output:
        if output.is_current(identity):
            return {"up to date": str(args.output), **output.manifest["counts"]}
        counts: Counter[str] = Counter()
        held, scenes = _rank(args, source, counts)
        again = open_rows(file, progress="writing", **options)
        endings: list[str] = []
        output.write_rows("heldout_prompts.jsonl", _prompts(again, held, endings))
        output.write_rows("sft.jsonl", _conversations(args, again, held, scenes, counts), prompts=False)
        written = {name: args.output / f".partial.{name}.jsonl" for name in ("heldout_prompts", "sft")}
        if not counts["SFT conversations"]:
            raise ConfigurationError(f"--source {args.source}: nothing is left for SFT; lower --held-out")
        ConversationSet([written["sft"]], flag="--output sft.jsonl")
        _check_held_out(_read(written["heldout_prompts"]), endings, _read(written["sft"]))
        counts["held-out prompts"] = len(held)
        output.finish(
            {"counts": dict(counts), "row_ids": {"heldout_prompts": [held[number] for number in sorted(held)]}}
        )
    return dict(counts)


def download(name: str, file: str, revision: str | None) -> tuple[str, str]:
    """Download one file of a hub data set into the hub's local cache; return its path and its commit."""
    from huggingface_hub import HfApi, hf_hub_download

    commit = HfApi().dataset_info(name, revision=revision).sha or ""
    return hf_hub_download(name, file, repo_type="dataset", revision=commit), commit


def _local(args: argparse.Namespace) -> tuple[str, str | None]:
    """Return the source as a local file or folder, and its commit if it came from the hub."""
    if args.source != HUB:
        if args.revision is not None:
            raise ConfigurationError(
                f"--revision {args.revision}: {args.source} is not {HUB}, which alone has revisions"
            )
        return args.source, None
    try:
        return download(HUB, HUB_FILE, args.revision)
    except Exception as error:  # the network, the hub's client and the disk raise errors of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ConfigurationError(
            f"--source {HUB}: {HUB_FILE} cannot be downloaded ({reason}); start again when it can be, or give a file"
        ) from error


def turns_of(row: Row) -> list[tuple[str, str]]:
    """Return (role, text) of each entry of a conversation.

    Raises:
        ConfigurationError: The row does not have the sharegpt layout.
    """
    found = row.values["conversations"]
    turns = []
    for entry in found if isinstance(found, list) else [found]:
        fields = entry if isinstance(entry, dict) else {}
        role, text = ROLES.get(fields.get("from", "")), fields.get("value")
        if role is None or not isinstance(text, str):
            raise ConfigurationError(
                f'--source: {row.where} has no list of {{"from": system, human or assistant, "value": text}} in '
                '"conversations"; expected the sharegpt layout'
            )
        turns.append((role, text))
    return turns


def unusable(turns: list[tuple[str, str]], *, keep_all: bool) -> str | None:
    """Return why a conversation is left out altogether, or None if it is usable."""
    answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        return "without an assistant turn"
    if not any(role == "user" for role, _ in turns[: answers[-1]]) or turns[0][0] == "assistant":
        return "without a human turn before the answer"
    if any(role != "system" and not text.strip() for role, text in turns):
        return "with a blank turn"
    system = " ".join(text for role, text in turns if role == "system")
    names = all(_NAME.fullmatch(turns[place][1].strip()) and len(turns[place][1].split()) <= 4 for place in answers)
    if not keep_all and (_NO_CHARACTER.search(system) or (names and len(answers) > 1)):
        return "environment or next speaker"
    return None


def length(turns: list[tuple[str, str]]) -> int:
    """Count the dialogue turns, without the opening mark."""
    dialogue = [text for role, text in turns if role != "system"]
    return len(dialogue) - sum(text.strip() == _START for text in dialogue[:1])


def utterances(texts: Iterable[str]) -> set[int]:
    """Return 64-bit hashes of the utterances in ``texts`` that are long enough to identify a scene."""
    lines = (normalized(_SPEAKER.sub("", line)) for text in texts for line in text.splitlines())
    return {_hash(line) for line in lines if len(line.replace(" ", "")) >= _IDENTIFYING_LENGTH}


def _hash(line: str) -> int:
    """Return a 64-bit hash of ``line``."""
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big")


def _rank(args: argparse.Namespace, source: RowSource, counts: Counter[str]) -> tuple[dict[int, str], set[int]]:
    """Choose the held-out conversations: return {row number: id} and the hashes of all their utterances."""
    lengths, numbers, scenes = array("L"), array("L"), []
    ids: list[str] = []
    for number, row in enumerate(source):
        counts["rows"] += 1
        turns = turns_of(row)
        ids.append(row.id)
        if unusable(turns, keep_all=args.keep_all_conversations) or _too_long(args, turns[: _last_answer(turns)]):
            continue
        lengths.append(length(turns))
        numbers.append(number)
        scenes.append(array("Q", utterances(text for role, text in turns if role != "system")))
    order = sorted(range(len(numbers)), key=lambda place: (-lengths[place], numbers[place]))
    if len(order) <= args.held_out:
        raise ConfigurationError(
            f"--held-out {args.held_out}: {args.source} has {len(order)} usable conversations in {counts['rows']} "
            "rows; hold out fewer"
        )
    chosen = order[: args.held_out]
    counts["turns of the shortest held out"] = lengths[chosen[-1]]
    return {numbers[place]: ids[numbers[place]] for place in chosen}, {
        line for place in chosen for line in scenes[place]
    }


def _prompts(source: RowSource, held: dict[int, str], endings: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the held-out prompts in file order; append the turns that follow each prompt to ``endings``."""
    for number, row in enumerate(source):
        if number in held:
            turns = turns_of(row)
            end = _last_answer(turns)
            endings += [text for _, text in turns[end:]]
            yield {"id": row.id, "messages": _messages(turns[:end]), "category": "roleplay"}


def _conversations(
    args: argparse.Namespace, source: RowSource, held: dict[int, str], scenes: set[int], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the conversations for SFT in file order; count those that are left out."""
    for number, row in enumerate(source):
        if number in held:
            continue
        turns = turns_of(row)
        reason = unusable(turns, keep_all=args.keep_all_conversations)
        if reason is None and _too_long(args, turns):
            reason = "too long"
        if reason is None and utterances(text for role, text in turns if role != "system") & scenes:
            reason = "of a held-out scene"
        counts[reason or "SFT conversations"] += 1
        if reason is None:
            yield {"id": row.id, "messages": _messages(turns)}


def _check_held_out(prompts: Iterable[dict[str, Any]], endings: Iterable[str], sft: Iterable[dict[str, Any]]) -> None:
    """Check that no held-out text occurs in the SFT rows.

    Compares texts, not the hashes by which scenes were told apart: each held-out line, with and without the speaker,
    with each SFT line.

    Raises:
        ConfigurationError: A held-out text occurs; the message names the row.
    """
    said = [message["content"] for row in prompts for message in row["messages"] if message["role"] != "system"]
    lines = {form for text in (*said, *endings) for form in _forms(text)}
    for row in sft:
        for message in row["messages"]:
            if message["role"] != "system":
                found = lines.intersection(_forms(message["content"]))
                if found:
                    raise ConfigurationError(
                        f"--output: SFT row {row['id']} holds held-out text ({min(found)[:60]!r}); this is a fault of "
                        "prepare_prompts, nothing was written"
                    )


def _forms(text: str) -> Iterator[str]:
    """Yield the long lines of ``text`` as letters and digits, with and without the speaker."""
    for line in text.splitlines():
        for form in (line, line.partition(": ")[2]):
            letters = "".join(character for character in form.lower() if character.isalnum())
            if len(letters) >= _IDENTIFYING_LENGTH:
                yield letters


def _last_answer(turns: list[tuple[str, str]]) -> int:
    """Return the index of the last assistant turn."""
    return max(place for place, (role, _) in enumerate(turns) if role == "assistant")


def _too_long(args: argparse.Namespace, turns: list[tuple[str, str]]) -> bool:
    """Return whether ``turns`` have more characters than ``--max-characters``."""
    return args.max_characters is not None and sum(len(text) for _, text in turns) > args.max_characters


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return ``turns`` as chat messages."""
    return [{"role": role, "content": text} for role, text in turns]


def _read(path: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
