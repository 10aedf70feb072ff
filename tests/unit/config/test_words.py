"""Texts and paths that no program should take: refused in one line, by every command alike."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.config.program import Parser, path_argument, run_program
from megatron_camopd.config.words import check_file, check_value, one_line, shown
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import World, refusal

CONTROL = ["\0", "\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\x9f", "\u2028", "\u2029"]


def explanation(value: Any, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_value("--flag", value, **({"is_path": True} | options))
    line = str(caught.value)
    assert line.isprintable() and len(line) < 400 and line.startswith("--flag '"), line
    return line


@pytest.mark.parametrize("character", CONTROL)
def test_control_characters(character: str) -> None:
    for text in (character, f"a{character}", f"/a/{character}/b", f"a{character}b" * 1000):
        for value in (text, Path(text), [text], ["good", text], ("good", Path(text))):
            assert "holds the control character" in explanation(value, is_path=False)
    if character in "\n\t":
        check_value("--flag", f"a{character}b", is_path=False, multiline=True)
    else:
        assert explanation(f"a{character}b", is_path=False, multiline=True)


def test_what_is_not_utf_8() -> None:
    for text in ("\udcff", "a\ud800b", os.fsdecode(b"\xff\xfe")):
        assert explanation(text).endswith("is not UTF-8; expected text that is")


def test_lengths() -> None:
    for fine in ("a" * 255, "/" + "a" * 255 + "/b", "\u00e4" * 127, ("a" * 15 + "/") * 255 + "a" * 15, "", "x y"):
        check_value("--flag", fine, is_path=True)
    for text, words in (
        ("a" * 256, "has a part of 256 bytes; names of files and folders have at most 255"),
        ("b/" + "\u00e4" * 128 + "/c", "has a part of 256 bytes"),
        (("a" * 15 + "/") * 256, "has 4096 bytes; a path has at most 4095"),
        ("a/" * 100_000, "has 200000 bytes"),
    ):
        assert words in explanation(text)
        check_value("--flag", text, is_path=False)


def test_other_values_pass() -> None:
    for value in (None, 3, 1.5, True, [1, 2], {"a": "\n"}, []):
        check_value("--flag", value, is_path=True)


def test_what_is_shown() -> None:
    assert shown("a\nb") == "'a\\nb'" and len(shown("x" * 1000)) < 100
    assert one_line("a\n  b\x1b[31m\0c") == "a b\\x1b[31m\\x00c"
    assert one_line("x" * 5000).endswith("x...") and len(one_line("x" * 5000)) < 700


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for fine in ("file", "link", "absent"):
        check_file("--flag", tmp_path / fine, "a table")
    for name, words in ((".", "is a folder"), ("fifo", "is no regular file"), ("/dev/null", "is no regular file")):
        with pytest.raises(ConfigurationError, match=f"--flag {tmp_path / name}: {words}; expected a table"):
            check_file("--flag", tmp_path / name, "a table")


def parser() -> Parser:
    made = Parser(prog="tool", unlimited=["title"], multiline=["text"])
    made.add_argument("runs", nargs="*", metavar="RUN")
    made.add_argument("--save", type=path_argument)
    made.add_argument("--mode", choices=("a", "b"))
    made.add_argument("--title")
    made.add_argument("--text")
    made.add_argument("--count", type=int)
    commands = made.add_subparsers(dest="command")
    commands.add_parser("deep").add_argument("--source", action="append")
    return made


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--save", ""], "argument --save: is empty; expected a path"),
        (["--save"], "argument --save: expected one argument"),
        (["--save", "a\0b"], "--save 'a\\x00b': holds the control character '\\x00'; expected text without any"),
        (["--save", "x" * 300], f"--save '{'x' * 80}'...: has a part of 300 bytes; names of files and folders have at"),
        (["--mode", "c\n"], "argument --mode: invalid choice: 'c\\n' (choose from 'a', 'b')"),
        (["--count", "1" * 9000], "argument --count: invalid int value: '111"),
        (["--title", "a\nb"], "--title 'a\\nb': holds the control character"),
        (["--text", "a\0b"], "--text 'a\\x00b': holds the control character"),
        (["--none\x1b[2J", "deep"], "unrecognized arguments: --none\\x1b[2J"),
        (["deep", "--source", "a", "--source", "b\rc"], "--source 'b\\rc': holds the control character"),
        (["deep", "--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_the_parser_refuses_in_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("tool.py", lambda: parser().parse_args(words)) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"tool.py: error: {line}") and said.err.count("\n") == 1 and len(said.err) < 800
    assert "usage" not in said.err and not said.out


def test_the_parser_takes_what_is_right() -> None:
    found = parser().parse_args(["--title", "x" * 5000, "--text", "a\nb" * 500, "--save", "a/b", "deep"])
    assert found.save == Path("a/b") and len(found.text) == 1500


def test_errors_of_the_system_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error, line, status in (
        (OSError(28, "No space left on device", "/a\nb"), "error: '/a\\nb': No space left on device", 2),
        (OSError("two\nlines"), "error: two lines", 2),
        (ConfigurationError("--x: is wrong"), "error: --x: is wrong", 2),
        (KeyboardInterrupt(), "stopped by SIGINT", 130),
    ):
        assert run_program("tool.py", lambda error=error: fail(error)) == status  # type: ignore[misc]
        assert capsys.readouterr().err == f"tool.py: {line}\n"
    with pytest.raises(argparse.ArgumentTypeError):
        path_argument("")


@pytest.mark.parametrize(
    "changes",
    [
        {"load": "a\nb"}, {"save": "/tmp/a\0b"}, {"general_prompts": ["fine", "a\rb"]}, {"save": "x" * 256},
        {"load": "y/" * 3000}, {"domain_prompts": "a\x1b[31m"}, {"general_teacher_load": "a\x7f"},
        {"wandb_project": "a\nb"}, {"tensorboard_dir": "z" * 300}, {"branches": "a\tb.json"}, {"save": "a\u2028b"},
        {"load": "a\udcffb"},
    ],
)  # fmt: skip
def test_the_trainer_refuses_them_first(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    ((name, value),) = changes.items()
    line = refusal(world.flags(**({"save": tmp_path / "run"} | changes)))
    bad = value[-1] if isinstance(value, list) else value
    assert line.startswith(f"--{name.replace('_', '-')} {shown(bad)}: ") and line.isprintable() and len(line) < 300
    assert not (tmp_path / "run").exists()


def test_special_files_of_the_trainer(world: World, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "table.yaml")
    (tmp_path / "folder.json").mkdir()
    for name, words in (("table.yaml", "is no regular file"), ("folder.json", "is a folder")):
        assert refusal(world.flags(branches=tmp_path / name)).startswith(f"--branches {tmp_path / name}: {words}")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.jsonl")
    for name, flag in (("zero.jsonl", "domain_prompts"), ("fifo.jsonl", "general_prompts")):
        line = refusal(world.flags(**{flag: [world.general, tmp_path / name]}))
        assert line.startswith(f"--{flag.replace('_', '-')} {tmp_path / name}: is no regular file; expected a .jsonl")
    none = {"general_teacher_load": None, "general_prompts": None, "domain_prompts": None, "save": None}
    own = {"stage": "generate", "load": world.teacher, "prompts": world.general, "train_iters": None}
    os.mkfifo(tmp_path / "out")
    os.mkfifo(tmp_path / "late.partial")
    for responses, words in (
        (tmp_path / "out", "out: is no regular file"), ("/dev/null", "/dev/null: is no regular file"),
        (tmp_path / "late", "late.partial: is no regular file"), (tmp_path, "is a folder; name a file"),
    ):  # fmt: skip
        assert words in refusal(world.flags(**none, **own, responses=responses))
