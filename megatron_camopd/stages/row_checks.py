"""The check of all rows of a run's files before its processes meet, by one process, with the result kept on disk."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_camopd.checkpoint.assets import assets_dir
from megatron_camopd.data import ChatFormatter, ConversationFormatter, ConversationSet, PromptSet
from megatron_camopd.data.check_cache import load_report, report_key, store_report
from megatron_camopd.data.row_check import ConversationCheck, PromptCheck, RowCheck, Rows, check_rows
from megatron_camopd.data.row_report import RowReport

_MOST_WORKERS = 32


def checks_rows() -> bool:
    """Return whether this process checks the rows: one does, by its environment, because no group exists yet."""
    return os.environ.get("RANK", "0") == "0"


def check_prompts(
    prompts: PromptSet,
    formatter: ChatFormatter,
    checkpoint: str | Path,
    *,
    answers: ConversationFormatter | None = None,
) -> RowReport | None:
    """Encode all prompts and return what they come to, or None on all processes but one.

    Args:
        prompts: The prompts of a branch or of a generation run.
        formatter: Encoder of prompts.
        checkpoint: The checkpoint directory that the tokenizer is from.
        answers: Encoder of the conversations that responses make of the prompts, if these are to be trained on.

    Raises:
        ConfigurationError: A prompt cannot be encoded, or all are too long and skipped. Names flag, file and row.
    """
    places = {path: place for place, path in enumerate(dict.fromkeys(prompt.source for prompt in prompts.prompts))}
    return _report(
        PromptCheck(formatter, prompts.flag, answers),
        prompts.prompts,
        files_sha256=prompts.sha256,
        unread_fields=prompts.unread,
        chosen=(f"{places[prompt.source]} {prompt.row}" for prompt in prompts.prompts),
        checkpoint=checkpoint,
        flag=prompts.flag,
    )


def check_conversations(
    conversations: ConversationSet,
    formatter: ConversationFormatter,
    checkpoint: str | Path,
    *,
    row_length: int,
    batch_rows: int | None,
) -> RowReport | None:
    """Encode all conversations and return what they come to, or None on all processes but one.

    Args:
        conversations: The conversations.
        formatter: Encoder of conversations.
        checkpoint: The checkpoint directory that the tokenizer is from.
        row_length: Tokens of a packed row.
        batch_rows: Packed rows of a batch, which must hold all sequences of a conversation; None: any number.

    Raises:
        ConfigurationError: A conversation cannot be encoded or is too large for a batch, or none has something to
            train. Names flag, file and row.
    """
    return _report(
        ConversationCheck(formatter, conversations.flag, row_length, batch_rows),
        conversations,
        files_sha256=conversations.sha256,
        unread_fields=conversations.unread,
        chosen=["all"],
        checkpoint=checkpoint,
        flag=conversations.flag,
    )


def _report(
    check: RowCheck,
    rows: Rows,
    *,
    files_sha256: str,
    unread_fields: dict[str, int],
    chosen: Iterable[str],
    checkpoint: str | Path,
    flag: str,
) -> RowReport | None:
    if not checks_rows():
        return None
    key = report_key(check, files_sha256=files_sha256, rows=chosen, tokenizer_sha256=_tokenizer_sha256(checkpoint))
    report = load_report(key)
    if report is None:
        workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
        report = check_rows(check, rows, workers=workers, title=f"encoding {flag}")
        store_report(key, report)
    return dataclasses.replace(report, unread_fields=unread_fields)


def _tokenizer_sha256(checkpoint: str | Path) -> str:
    """Return the digest of the small files of a checkpoint: tokenizer, chat templates and configs."""
    folder, digest = assets_dir(checkpoint), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
