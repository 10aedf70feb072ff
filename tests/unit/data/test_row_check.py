"""The check of all rows before a run: the same result in worker processes, kept on disk by what decides it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.data import ChatFormatter, ConversationFormatter, ConversationSet, PromptSet, read_prompts
from megatron_camopd.data.check_cache import load_report, report_key, store_report
from megatron_camopd.data.row_check import ConversationCheck, PromptCheck, check_rows
from megatron_camopd.data.row_report import RowReport
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import CHATML, make_tokenizer

# Turns that were the last ones are marked, so that each of several gets a sequence of its own.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if loop.last and m.role == 'assistant' %}!{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
ALONE: dict[str, Any] = {"workers": 1, "title": "t"}
FRAME = 17  # tokens that CHATML puts around a prompt


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts_of(folder: Path, lengths: list[int], *, refused: tuple[int, ...] = ()) -> PromptSet:
    rows = [{"prompt": "refuse this" if row in refused else "p" * n} for row, n in enumerate(lengths)]
    return read_prompts([write(folder / "prompts.jsonl", rows)], flag="--general-prompts")


def prompt_check(limit: int = 1000, overlong: str = "truncate-left", template: str | None = CHATML) -> PromptCheck:
    tokenizer = make_tokenizer(chat_template=template)
    formatter = ChatFormatter(tokenizer, template_kwargs={}, max_prompt_length=limit, overlong=overlong)
    return PromptCheck(formatter, "--general-prompts")


def conversation_check(
    limit: int = 1000, overlong: str = "truncate-right", batch_rows: int | None = 8
) -> ConversationCheck:
    formatter = ConversationFormatter(
        make_tokenizer(chat_template=MARKED), template_kwargs={}, end_of_sequence_ids=[2], max_length=limit,
        overlong=overlong,
    )  # fmt: skip
    return ConversationCheck(formatter, "--conversations", limit, batch_rows)


def conversations_of(folder: Path, turns: list[int], *, words: int = 5, **fields: Any) -> ConversationSet:
    exchange = [{"role": role, "content": "w" * words} | fields for role in ("user", "assistant")]
    rows = [{"messages": exchange * count} for count in turns]
    return ConversationSet([write(folder / "conversations.jsonl", rows)], flag="--conversations")


def refusal(check: Any, rows: Any, **settings: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_rows(check, rows, **(ALONE | settings))
    line = str(caught.value)
    assert "\n" not in line
    return line


LENGTHS = [1, 30, 50, 7, 50]


@pytest.mark.parametrize(
    ("limit", "overlong", "expected"),
    [
        (1000, "truncate-left", RowReport(5, 50 + FRAME, 0, 0)),
        (FRAME + 30, "truncate-left", RowReport(5, 50 + FRAME, 2, 0)),
        (FRAME + 29, "skip", RowReport(5, 50 + FRAME, 3, 3)),
        (10, "truncate-left", RowReport(5, 50 + FRAME, 5, 0)),
    ],
)
def test_prompts_are_counted(tmp_path: Path, limit: int, overlong: str, expected: RowReport) -> None:
    prompts = prompts_of(tmp_path, LENGTHS).prompts
    assert check_rows(prompt_check(limit, overlong), prompts, **ALONE) == expected


def test_prompts_that_cannot_be_used(tmp_path: Path) -> None:
    place = f"--general-prompts: {tmp_path / 'prompts.jsonl'} line"
    prompts = prompts_of(tmp_path, LENGTHS, refused=(2, 4)).prompts
    assert refusal(prompt_check(), prompts).startswith(f"{place} 3: the tokenizer's chat template fails for this row")
    assert "encodes to no tokens" in refusal(prompt_check(template="{{ '' }}"), prompts)
    assert refusal(prompt_check(template="{{ oops( }}"), prompts).startswith(f"{place} 1: the tokenizer's chat")
    short = prompts_of(tmp_path, LENGTHS).prompts
    assert refusal(prompt_check(5, "skip"), short).startswith("--general-prompts: all 5 prompts are longer than --max-")


def test_conversations_are_counted(tmp_path: Path) -> None:
    found = conversations_of(tmp_path, [1, 3, 2, 1], name="n")
    report = check_rows(conversation_check(), found, **ALONE)
    lengths = [len(s) for row in found for s in conversation_check().formatter.encode(row)]
    assert report == RowReport(4, max(lengths), 0, 0, 2, {"name": 14})
    assert report.notes() == ["14 messages have a `name`, which the chat template does not read"]
    cut = check_rows(conversation_check(lengths[0] + 1), found, **ALONE)
    assert (cut.overlong, cut.unusable, cut.split) == (2, 0, 0)  # of the longer ones the first turn is left
    assert cut.turns_dropped == 2 + 1
    assert ", 3 assistant turns of the rest cut off whole" in cut.line("--seq-length", "truncate-right")
    left_out = check_rows(conversation_check(lengths[0], "skip"), found, **ALONE)
    assert (left_out.overlong, left_out.unusable) == (2, 2)


@pytest.mark.parametrize(
    ("overlong", "words"),
    [
        ("skip", "fits --seq-length 40; raise it, or let --overlong-conversations truncate-right cut them"),
        ("truncate-right", "has anything to train within --seq-length 40; raise it"),
    ],
)
def test_conversations_of_which_none_can_be_trained(tmp_path: Path, overlong: str, words: str) -> None:
    found = conversations_of(tmp_path, [1, 2], words=50)
    line = refusal(conversation_check(40, overlong), found)
    assert line == f"--conversations: not one of the 2 conversations {words}"


def test_a_conversation_too_large_for_a_batch(tmp_path: Path) -> None:
    found = conversations_of(tmp_path, [1, 4, 5], words=30)
    place = f"--conversations: {tmp_path / 'conversations.jsonl'} line"
    assert refusal(conversation_check(500, batch_rows=1), found).startswith(f"{place} 2: ")
    line = refusal(conversation_check(500, batch_rows=2), found)
    assert line.startswith(f"{place} 3: ") and "5 sequences, which do not fit a batch of 2 rows" in line
    for rows in (3, None):
        assert check_rows(conversation_check(500, batch_rows=rows), found, **ALONE).split == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same(tmp_path: Path, workers: int) -> None:
    many = [row % 37 for row in range(1, 2000)]
    prompts = prompts_of(tmp_path, [n + 1 for n in many]).prompts
    settings: dict[str, Any] = {"workers": workers, "title": "t", "pool_from": 100, "pool_seconds": 0}
    inline = check_rows(prompt_check(40, "skip"), prompts, **ALONE)
    assert check_rows(prompt_check(40, "skip"), prompts, **settings) == inline and inline.rows == 1999
    assert 0 < inline.unusable < 1999
    turns = conversations_of(tmp_path, [1 + n % 4 for n in many[:600]], tool_call_id="x")
    alone = check_rows(conversation_check(), turns, **ALONE)
    assert check_rows(conversation_check(), turns, **settings) == alone and alone.unread
    bad = prompts_of(tmp_path, [5] * 1999, refused=(700, 701, 1900)).prompts
    assert "line 701: the tokenizer's chat template fails" in refusal(prompt_check(), bad, **settings)


class Dying:
    """A check whose worker processes are killed."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self, rows: Any) -> RowReport:
        if os.getpid() != self.parent:
            os._exit(9)
        return RowReport(len(rows))

    def verdict(self, report: RowReport) -> None:
        assert report.rows == 600

    def settings(self) -> dict[str, Any]:
        return {}


def test_killed_workers_are_replaced_by_this_process() -> None:
    assert check_rows(Dying(), list(range(600)), workers=2, title="t", pool_from=9, pool_seconds=0) == RowReport(600)


class Noting:
    """A check that takes a while and leaves a file named by the worker's process id."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds, self.parent = folder, seconds, os.getpid()

    def __call__(self, rows: Any) -> RowReport:
        if os.getpid() != self.parent:
            (self.folder / str(os.getpid())).touch()
            time.sleep(self.seconds)
        return RowReport(len(rows))

    def verdict(self, report: RowReport) -> None: ...

    def settings(self) -> dict[str, Any]:
        return {}


class Halting:
    """Rows of which the last chunk does not come, so that the workers wait for it."""

    def __len__(self) -> int:
        return 2000

    def __iter__(self) -> Iterator[int]:
        yield from range(1200)
        time.sleep(600)


def check_and_be_killed(folder: str, kind: str) -> None:
    """Check rows with two workers that are at work, or that wait, when this process is killed."""
    rows, seconds = (Halting(), 0.5) if kind == "waiting" else (list(range(2000)), 600.0)
    check_rows(Noting(Path(folder), seconds), rows, workers=2, title="t", pool_from=9, pool_seconds=0)


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["working", "waiting"])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, kind: str) -> None:
    code = f"from {__name__} import check_and_be_killed; check_and_be_killed({str(tmp_path)!r}, {kind!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.1)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        time.sleep(2)  # those that are to wait have done their chunks
        assert not any(map(gone, workers))
    finally:
        parent.kill()
        parent.wait()
    try:
        deadline = time.monotonic() + 20
        while not all(map(gone, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [process for process in workers if not gone(process)] == []
    finally:
        for process in workers:
            if not gone(process):
                os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("report", "policy", "line"),
    [
        (RowReport(1234, 5012, 12), "truncate-left",
         "1,234 rows, longest 5,012 tokens, 12 longer than --x (cut on the left)"),
        (RowReport(7, 40, 3, 3), "skip", "7 rows, longest 40 tokens, 3 longer than --x (left out)"),
        (RowReport(7, 40, 3, 2, 1), "truncate-right",
         "7 rows, longest 40 tokens, 3 longer than --x (cut on the right), 2 with nothing left to train (left out), "
         "1 split into their turns"),
        (RowReport(7, 40, 3, 2, 1, {}, 1200), "truncate-right",
         "7 rows, longest 40 tokens, 3 longer than --x (cut on the right), 2 with nothing left to train (left out), "
         "1,200 assistant turns of the rest cut off whole, 1 split into their turns"),
        (RowReport(7, 40), "skip", "7 rows, longest 40 tokens"),
    ],
)  # fmt: skip
def test_a_report_in_words(report: RowReport, policy: str, line: str) -> None:
    assert report.line("--x", policy) == line


def test_notes_of_a_report() -> None:
    assert RowReport(5, 5).notes() == []
    some = RowReport(
        9, 9, unread={"name": 1200}, special=3, unread_fields={"source": 1234, "a\nb": 2, "zone": 1234, "": 1}
    )
    assert some.notes() == [
        "1,200 messages have a `name`, which the chat template does not read",
        "3 rows hold special tokens, which are encoded as such",
        "not read: source (1,234 rows), zone (1,234 rows), 'a\\nb' (2 rows), '' (1 rows)",
    ]
    many = RowReport(9, 9, unread_fields={f"field{n:02}" + "x" * 60 * (n == 0): 3 for n in range(1010)})
    (line,) = many.notes()
    assert line.startswith("not read: field00xxx") and line.endswith("field07 (3 rows) and 1,002 more")
    assert len(line) < 260


# The cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megatron_camopd" / "row_checks"


def key(check: Any, **changes: Any) -> str:
    given: dict[str, Any] = {"files_sha256": "f", "rows": ["0 1", "0 2"], "tokenizer_sha256": "t"}
    return report_key(check, **(given | changes))


def test_a_report_is_kept(cache: Path) -> None:
    report = RowReport(5, 6, 1, 0, 2, {"name": 3}, 4)
    name = key(prompt_check())
    assert load_report(name) is None
    store_report(name, report)
    assert load_report(name) == report and [path.name for path in cache.iterdir()] == [f"{name}.json"]


def test_what_decides_a_report_decides_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        key(prompt_check()), key(prompt_check(999)), key(prompt_check(overlong="skip")),
        key(prompt_check(), files_sha256="g"), key(prompt_check(), rows=["0 1"]),
        key(prompt_check(), rows=["0 1", "1 2"]), key(prompt_check(), tokenizer_sha256="u"),
        key(conversation_check()), key(conversation_check(overlong="skip")), key(conversation_check(batch_rows=9)),
        key(conversation_check(batch_rows=None)), key(conversation_check(999)),
    ]  # fmt: skip
    thinking = ChatFormatter(make_tokenizer(), template_kwargs={"thinking": False}, max_prompt_length=1000)
    keys.append(key(PromptCheck(thinking, "--general-prompts")))
    ends = ConversationFormatter(
        make_tokenizer(chat_template=MARKED), template_kwargs={}, end_of_sequence_ids=[0, 2], max_length=1000
    )
    keys.append(key(ConversationCheck(ends, "--conversations", 1000, 8)))
    for name in ("transformers", "tokenizers", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.metadata.version", lambda asked, name=name: "0" if asked == name else "1")
            keys.append(key(prompt_check()))
    with monkeypatch.context() as patch:
        patch.setattr("megatron_camopd.data.check_cache.VERSION", -1)
        keys.append(key(prompt_check()))
    assert len(set(keys)) == len(keys)
    assert key(prompt_check()) == keys[0]
    assert key(dataclasses.replace(prompt_check(), flag="--domain-prompts")) == keys[0]  # a flag decides nothing


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"rows": 5}x', '{"rows": -1}', '{"rows": "5"}', '{"rows": true}', '{"lines": 5}',
     '{"unread": [1]}', '{"unread": 5}', '{"rows": {"a": 1}}', '{"turns_dropped": -1}',
     '{"unread": {"a": "b"}}', "[" * 100_000, "\x00\xff"],
)  # fmt: skip
def test_a_damaged_file_is_ignored_and_replaced(cache: Path, damage: str) -> None:
    name = key(prompt_check())
    store_report(name, RowReport(5))
    (cache / f"{name}.json").write_bytes(damage.encode("latin-1"))
    assert load_report(name) is None
    store_report(name, RowReport(5))
    assert load_report(name) == RowReport(5)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for value in (str(tmp_path / "file"), "/proc/no/such", "/dev/null/x"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        store_report("a", RowReport(1))
        assert load_report("a") is None
    # A relative one is ignored, as the standard says, for that of the home directory.
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    store_report("a", RowReport(1))
    assert (tmp_path / ".cache" / "megatron_camopd" / "row_checks" / "a.json").is_file() and load_report("a")
