"""Checks of texts and paths that a user gives: no control characters, no impossible lengths, files that are files.

A line break in a path would tear the one line of an error in two, a NUL makes system calls raise, and a FIFO named as a
file stops a program for ever. All of it is found here, before anything else happens.
"""

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from megatron_camopd.errors import ConfigurationError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, by Linux; the path's last byte is a NUL of its own
_LINE_SEPARATORS = "\u2028\u2029"
# Arguments of Megatron's parser and of ours that name files or folders, by their names' last part.
_NAMES_PATHS = re.compile(r"(^|_)(load|save|dir|path|file|prompts|conversations|responses|branches)$")


def names_path(argument: str) -> bool:
    """Return whether the argument of this name, such as ``general_teacher_load``, names a file or a folder."""
    return _NAMES_PATHS.search(argument) is not None


def check_value(flag: str, value: Any, *, is_path: bool, multiline: bool = False) -> None:
    """Check the value of an argument: the texts and paths in it, however many there are.

    Args:
        flag: The flag, for messages.
        value: A value of any type; numbers and the like pass.
        is_path: Whether its texts name files or folders.
        multiline: Whether line breaks and tabs are part of such a text, as in a system message.

    Raises:
        ConfigurationError: A text holds a control character or is not UTF-8, or a path is too long.
    """
    if isinstance(value, list | tuple):
        for part in value:
            check_value(flag, part, is_path=is_path, multiline=multiline)
    elif isinstance(value, str | Path):
        text, is_path = str(value), is_path or isinstance(value, Path)
        _check_characters(flag, text, allowed="\n\t" if multiline else "")
        if is_path:
            _check_lengths(flag, text)


def _check_characters(flag: str, text: str, *, allowed: str) -> None:
    for character in text:
        category = unicodedata.category(character)
        if category == "Cs":
            raise ConfigurationError(f"{flag} {shown(text)}: is not UTF-8; expected text that is")
        if character not in allowed and (category == "Cc" or character in _LINE_SEPARATORS):
            raise ConfigurationError(
                f"{flag} {shown(text)}: holds the control character {ascii(character)}; expected text without any"
            )


def _check_lengths(flag: str, path: str) -> None:
    if len(path.encode()) > LONGEST_PATH:
        raise ConfigurationError(
            f"{flag} {shown(path)}: has {len(path.encode())} bytes; a path has at most {LONGEST_PATH}"
        )
    longest = max(len(part.encode()) for part in path.split("/"))
    if longest > LONGEST_NAME:
        raise ConfigurationError(
            f"{flag} {shown(path)}: has a part of {longest} bytes; names of files and folders have at most "
            f"{LONGEST_NAME}"
        )


def check_file(flag: str, path: str | os.PathLike[str], expected: str) -> None:
    """Check that what exists at ``path`` is a regular file, without opening it; no file at all passes.

    Raises:
        ConfigurationError: It is a folder, a FIFO, a socket or a device.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no regular file"
        raise ConfigurationError(f"{flag} {os.fspath(path)}: is {kind}; expected {expected}")


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as Python writes it, a text in quotes and with escapes, cut to about ``limit`` characters."""
    if not isinstance(value, str):
        return printable(repr(value), limit)
    return repr(value) if len(value) <= limit else f"{value[:limit]!r}..."


def printable(text: str, limit: int = 2000) -> str:
    """Return ``text`` with escapes for line breaks and what else is not printable, cut to ``limit`` characters."""
    visible = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text[:limit])
    return visible if len(text) <= limit else f"{visible}..."


def one_line(text: str, limit: int = 600) -> str:
    """Return ``text`` with white space joined, line breaks included; otherwise like :func:`printable`."""
    return printable(" ".join(text.split()), limit)
