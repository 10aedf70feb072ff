"""Check before a run that every row of its files can be encoded, and count what is cut or left out.

Files are read and their rows checked for form by ``read_prompts`` and ``ConversationSet``; here each row goes through
chat template and tokenizer, as it will in a step. A row that the template refuses, found at step 90, would cost the
run.

Many rows are shared out among worker processes. The result is the sum over the rows, so it does not depend on their
number, and neither does the row that an error names: the first bad one.
"""

import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import batched, islice
from typing import Any, Protocol

from tqdm import tqdm

from megatron_camopd.data.chat import ChatFormatter
from megatron_camopd.data.conversation_tokens import ConversationFormatter
from megatron_camopd.data.conversations import Conversation, answered, check_trainable
from megatron_camopd.data.packing import encoded, first_fit, none_fits, too_many_sequences
from megatron_camopd.data.prompt_files import Prompt
from megatron_camopd.data.row_report import RowReport
from megatron_camopd.data.stream import all_too_long
from megatron_camopd.errors import ConfigurationError

VERSION = 2
"""Version of these checks: raised when a row may be judged otherwise than before, because results are kept."""

POOL_FROM, POOL_SECONDS = 4000, 10.0
"""Rows, and seconds of one process, from which worker processes pay: to start them takes some seconds."""
_CHUNK_ROWS = 256
_ANSWER = "Good morning."
"""An answer that no template treats in a special way."""


class Rows(Protocol):
    """All rows of some files, in order."""

    def __len__(self) -> int: ...  # noqa: D105

    def __iter__(self) -> Iterator[Any]: ...  # noqa: D105


class RowCheck(Protocol):
    """The check of one kind of rows; it travels to worker processes."""

    def __call__(self, rows: Sequence[Any]) -> RowReport:
        """Encode rows and return what they come to.

        Raises:
            ConfigurationError: a row cannot be used. The text names flag, file and row.
        """
        ...

    def verdict(self, report: RowReport) -> None:
        """Check the report of all rows.

        Raises:
            ConfigurationError: not one row can be used.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Return what decides the report beside tokenizer and rows, as JSON values."""
        ...


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """The check of prompts.

    Attributes:
        formatter: encoder of prompts.
        flag: the flag that named their files.
        answers: encoder of the conversations that responses make of them, if these are to be trained on.
    """

    formatter: ChatFormatter
    flag: str
    answers: ConversationFormatter | None = None

    def __call__(self, rows: Sequence[Prompt]) -> RowReport:
        """Encode prompts; see :class:`RowCheck`."""
        longest = overlong = unusable = special = 0
        for prompt in rows:
            if self.answers is not None:
                conversation = answered(prompt, _ANSWER)
                check_trainable(conversation.messages, conversation.where, self.flag)
            try:
                token_ids = self.formatter.encode(prompt)
                if self.answers is None:
                    special += self.formatter.check(prompt)
                else:
                    self.answers.encode(conversation)
            except ConfigurationError as error:
                raise ConfigurationError(f"{self.flag}: {error}") from error
            longest = max(longest, self.formatter.length)
            overlong += token_ids is None or self.formatter.length > len(token_ids)
            unusable += token_ids is None
        return RowReport(len(rows), longest, overlong, unusable, special=special)

    def verdict(self, report: RowReport) -> None:
        """Check that a prompt is left; see :class:`RowCheck`."""
        if report.unusable == report.rows:
            raise ConfigurationError(all_too_long(self.flag, report.rows))

    def settings(self) -> dict[str, Any]:
        """Return the settings; see :class:`RowCheck`."""
        answers = None if self.answers is None else self.answers.settings()
        return {"kind": "prompts", **self.formatter.settings(), "answers": answers}


@dataclass(frozen=True, slots=True)
class ConversationCheck:
    """The check of conversations.

    Attributes:
        formatter: encoder of conversations.
        flag: the flag that named their files.
        row_length: tokens of a packed row.
        batch_rows: packed rows of a batch, which must hold all sequences of a conversation; None: any number.
    """

    formatter: ConversationFormatter
    flag: str
    row_length: int
    batch_rows: int | None

    def __call__(self, rows: Sequence[Conversation]) -> RowReport:
        """Encode conversations; see :class:`RowCheck`."""
        longest = overlong = unusable = split = dropped = 0
        unread: Counter[str] = Counter()
        for conversation in rows:
            sequences = encoded(self.formatter, conversation, self.flag)
            longest = max(longest, self.formatter.longest)
            overlong += self.formatter.truncated
            unusable += not sequences
            split += len(sequences) > 1
            unread += self.formatter.unread
            dropped += self.formatter.turns_dropped
            lengths = [len(sequence) for sequence in sequences]
            if self.batch_rows is not None and first_fit(lengths, [self.row_length] * self.batch_rows) is None:
                raise ConfigurationError(too_many_sequences(self.flag, conversation, len(lengths), self.batch_rows))
        return RowReport(len(rows), longest, overlong, unusable, split, dict(unread), dropped)

    def verdict(self, report: RowReport) -> None:
        """Check that a conversation is left; see :class:`RowCheck`."""
        if report.unusable == report.rows:
            raise ConfigurationError(none_fits(self.flag, report.rows, self.formatter))

    def settings(self) -> dict[str, Any]:
        """Return the settings; see :class:`RowCheck`."""
        batch = {"row_length": self.row_length, "batch_rows": self.batch_rows}
        return {"kind": "conversations", **batch, **self.formatter.settings()}


def check_rows(
    check: RowCheck,
    rows: Rows,
    *,
    workers: int,
    title: str,
    pool_from: int = POOL_FROM,
    pool_seconds: float = POOL_SECONDS,
) -> RowReport:
    """Encode all rows.

    Args:
        check: the check of this kind of rows.
        rows: all rows.
        workers: number of worker processes that may be started.
        title: title of the progress bar, which is shown if this takes more than two seconds.
        pool_from: number of rows up to which none is started.
        pool_seconds: time that this process alone would take, estimated from the first rows, up to which none is
            started.

    Raises:
        ConfigurationError: a row cannot be used, or not one row can. The text names flag, file and row.
    """
    share_out = workers > 1 and len(rows) > pool_from
    try:
        report = _sum(_reports(check, rows, workers if share_out else 1, pool_seconds), len(rows), title)
    except BrokenProcessPool:  # a worker was killed, such as for memory
        report = _sum(_reports(check, rows, 1, pool_seconds), len(rows), title)
    check.verdict(report)
    return report


def _sum(parts: Iterable[RowReport], count: int, title: str) -> RowReport:
    """Add up the reports of parts of ``count`` rows, with a progress bar."""
    report = RowReport()
    with tqdm(total=count, desc=title, unit=" rows", delay=2) as bar:
        for part in parts:
            report += part
            bar.update(part.rows)
    return report


def _reports(check: RowCheck, rows: Rows, workers: int, pool_seconds: float) -> Iterator[RowReport]:
    """Yield the reports of chunks of rows, in order."""
    chunks = batched(rows, _CHUNK_ROWS)
    start = time.monotonic()
    for chunk in islice(chunks, 1):
        yield check(chunk)
    if workers > 1 and (time.monotonic() - start) * len(rows) > pool_seconds * _CHUNK_ROWS:
        yield from _in_pool(check, chunks, workers)
    else:
        yield from map(check, chunks)


def _in_pool(check: RowCheck, chunks: Iterable[Sequence[Any]], workers: int) -> Iterator[RowReport]:
    """Yield the reports of chunks of rows, in order. Few chunks are on their way at a time, because rows are large."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of tokenizers and torch
    waiting: deque[Future[RowReport]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(check,)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_check_in_worker, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_check: RowCheck


def _start_worker(check: RowCheck) -> None:
    """Keep the check in this worker process, so that the tokenizer travels once."""
    global _worker_check
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    _worker_check = check


def _end_with_parent() -> None:
    """End this worker process when the one that started it ends; a killed parent cannot tell it to."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker process"
    parent.join()
    os._exit(1)  # the main thread waits for a chunk that nobody will send


def _check_in_worker(rows: Sequence[Any]) -> RowReport:
    return _worker_check(rows)
