"""Settings declared as dataclasses: flags, help, ranges, and what a resumed run keeps, all from one field."""

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from megatron_camopd.config.checks import check_relevance
from megatron_camopd.config.resume import check_kept_settings
from megatron_camopd.config.settings import Range, Settings, above, add_settings, at_least, setting, switch
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.runtime import accelerator


@dataclass(frozen=True, kw_only=True)
class ExampleSettings(Settings):
    """Example group: what the description says."""

    share: float = setting(0.5, within=Range(0, 1, open_low=True), kept=True)
    """a share of something"""

    count: int | None = setting(None, within=at_least(1), metavar="N")
    """how many (100% by default)"""

    kind: Literal["plain", "fancy"] = setting("plain")
    """which kind"""

    names: list[str] | None = setting(None, metavar="NAME")
    """some names"""

    table: dict[str, Any] = setting({}, parse=lambda text: {text: len(text)})
    """a mapping"""

    engine: str = setting("a")
    """which engine"""

    quick: bool = switch(True)
    """be quick"""


@dataclass(frozen=True, kw_only=True)
class OtherSettings(Settings):
    """Other group."""

    other_size: int = setting(1)
    """a size"""


def parse(*words: str) -> argparse.Namespace:
    accelerator.activate()
    parser = argparse.ArgumentParser()
    add_settings(parser, [ExampleSettings, OtherSettings], {"engine": ("a", "b")})
    return parser.parse_args(words)


def test_defaults_are_the_fields() -> None:
    assert ExampleSettings.of(parse()) == ExampleSettings()
    first, second = ExampleSettings(), ExampleSettings()
    assert first.table == {} and first.table is not second.table


def test_flags_have_the_types_of_the_fields() -> None:
    words = ["--share", "0.25", "--count", "3", "--kind", "fancy", "--names", "x", "y", "--table", "abc", "--engine"]
    found = ExampleSettings.of(parse(*words, "b", "--no-quick"))
    assert found == ExampleSettings(
        share=0.25, count=3, kind="fancy", names=["x", "y"], table={"abc": 3}, engine="b", quick=False
    )


@pytest.mark.parametrize("words", [["--kind", "odd"], ["--engine", "c"], ["--count", "many"], ["--names"]])
def test_other_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_help_is_made_of_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, [ExampleSettings], {"engine": ("a", "b")})
    text = " ".join(parser.format_help().replace("%%", "%").split())
    for part in ("Example group", "what the description says", "--share SHARE a share of something", "--no-quick"):
        assert part in text


@pytest.mark.parametrize(
    ("within", "inside", "outside", "words"),
    [
        (at_least(1), [1, 2, 1e9], [0, 0.99, float("inf"), float("nan"), float("-inf")], "must be at least 1"),
        (above(0), [1e-9, 3], [0, -1, float("inf"), float("nan")], "must be above 0"),
        (Range(0, 1, open_low=True), [1e-9, 1], [0, 1.01, float("nan")], "must be in (0, 1]"),
        (Range(0, 1, open_high=True), [0, 0.99], [1, -0.1], "must be in [0, 1)"),
        (Range(high=3), [3, -9], [3.1, float("-inf")], "must be at most 3"),
        (Range(high=3, open_high=True), [2.9], [3], "must be below 3"),
        (Range(low=0, words="must be odd"), [0], [-1], "must be odd"),
    ],
)
def test_ranges(within: Range, inside: list[float], outside: list[float], words: str) -> None:
    assert all(map(within.contains, inside)) and not any(map(within.contains, outside))
    assert within.describe() == words


@pytest.mark.parametrize("value", ["nan", "inf", "0", "1.5"])
def test_a_value_out_of_range_is_one_line(value: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^--share {float(value)}: must be in \(0, 1\]$"):
        ExampleSettings.check(parse("--share", value), {})
    with pytest.raises(ConfigurationError, match="^--count 0: must be at least 1$"):
        ExampleSettings.check(parse("--count", "0"), {})
    ExampleSettings.check(parse(), {})


def test_settings_of_another_choice_are_refused() -> None:
    options: dict[str, list[type[Settings]]] = {"a": [ExampleSettings], "b": [OtherSettings]}
    args = parse("--engine", "b")
    check_relevance("engine", options, args, {"other_size": "--other-size"})
    with pytest.raises(ConfigurationError, match="^--share: has no effect with --engine b; drop one of the two$"):
        check_relevance("engine", options, args, {"share": "--share"})


def test_what_a_resumed_run_keeps() -> None:
    assert ExampleSettings.kept_arguments() == ("share",)
    check_kept_settings({"share": 0.5}, {"share": 0.5, "gone": 1}, save="run")
    check_kept_settings({"share": 0.5, "new": 1}, {"share": 0.5}, save="run")
    with pytest.raises(ConfigurationError, match="^--share is 0.5, but the checkpoint in --save run was made with 0.6"):
        check_kept_settings({"share": 0.5}, {"share": 0.6}, save="run")
