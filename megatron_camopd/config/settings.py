"""Settings as typed dataclasses, whose fields define flags, help texts, ranges and what a resumed run must keep.

A subpackage declares its settings in a frozen dataclass derived from :class:`Settings`:

    @dataclass(frozen=True, kw_only=True)
    class HeadSettings(Settings):
        '''CaMOPD output head: log-probabilities and loss from the last hidden states.'''

        head_chunk: int = setting(64, within=at_least(1), kept=True)
        '''Tokens whose logits exist at once.'''

In ``--help``, the class docstring up to the first colon is the title of the group and the rest its description. The
docstring of a field is the help text of its flag, and the name of the field gives the name of the flag.
``HeadSettings.of(args)`` reads an instance from parsed arguments. Megatron's ``ArgumentGroupFactory`` makes the flags,
so types, lists and ``Literal`` choices mean the same as in Megatron's dataclasses.
"""

import argparse
import dataclasses
import math
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from megatron_camopd.errors import ConfigurationError


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of the numbers that a setting may have; NaN and infinity are never in it.

    Attributes:
        low: Lower limit, or None for no limit.
        high: Upper limit, or None for no limit.
        open_low: Whether ``low`` itself is outside the range.
        open_high: Whether ``high`` itself is outside the range.
        words: Text of an error after the value, in place of the usual wording.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    words: str | None = None

    def contains(self, value: float) -> bool:
        """Return whether ``value`` lies in the range."""
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:  # a whole number that no float holds
            return False
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        below = self.high is None or value < self.high or (value == self.high and not self.open_high)
        return above and below

    def describe(self) -> str:
        """Return the requirement as the text of an error, such as "must be at least 1"."""
        if self.words is not None:
            return self.words
        if self.low is not None and self.high is not None:
            left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
            return f"must be in {left}{self.low:g}, {self.high:g}{right}"
        if self.low is not None:
            return f"must be {'above' if self.open_low else 'at least'} {self.low:g}"
        return f"must be {'below' if self.open_high else 'at most'} {self.high:g}"


def at_least(low: float) -> Range:
    """Return the range of finite numbers from ``low`` on."""
    return Range(low=low)


def above(low: float) -> Range:
    """Return the range of finite numbers larger than ``low``."""
    return Range(low=low, open_low=True)


def setting(
    default: Any,
    *,
    within: Range | None = None,
    kept: bool = False,
    may_be_infinite: bool = False,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    **argparse_options: Any,
) -> Any:
    """Declare a field of a :class:`Settings` class.

    Args:
        default: The value if the flag is not given; lists and dictionaries are copied.
        within: The allowed numbers. The value None means "not given" and is always allowed.
        kept: Whether a resumed run must have the same value, because another value would make it a different run.
        may_be_infinite: Whether "inf" is a value, as for a bound that is to bound nothing.
        metavar: Name of the value in ``--help``.
        parse: Function that makes the value from the word on the command line, if the field's type does not.
        argparse_options: Further options of ``add_argument``, which override those that follow from the field's type.
    """
    options = dict(argparse_options)
    if metavar is not None:
        options["metavar"] = metavar
    if parse is not None:
        options["type"] = parse
    metadata = {"argparse_meta": options, "within": within, "kept": kept, "infinite": may_be_infinite}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def switch(default: bool, *, kept: bool = False) -> Any:
    """Declare a field with the flags ``--name`` and ``--no-name``."""
    return setting(default, kept=kept, action=argparse.BooleanOptionalAction)


class Settings:
    """Base class of settings; a subclass is a frozen dataclass whose fields are flags (see the module's docstring)."""

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """Read the settings from parsed and checked ``args``."""
        return cls(**{name: getattr(args, name) for name in cls.argument_names()})

    @classmethod
    def argument_names(cls) -> tuple[str, ...]:
        """Return the argument names of all fields."""
        return tuple(field.name for field in _fields(cls))

    @classmethod
    def kept_arguments(cls) -> tuple[str, ...]:
        """Return the argument names of the fields that a resumed run must keep."""
        return tuple(field.name for field in _fields(cls) if field.metadata.get("kept"))

    @classmethod
    def infinite_arguments(cls) -> tuple[str, ...]:
        """Return the argument names of the fields that may be infinite."""
        return tuple(field.name for field in _fields(cls) if field.metadata.get("infinite"))

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check every number against the range of its field; called if the settings have an effect in the run.

        A subclass extends this method for further checks, and to set defaults in ``args`` that follow from other
        arguments.

        Args:
            args: The parsed arguments.
            given: The flags on the command line as written, by argument name.

        Raises:
            ConfigurationError: Names the flag, the value and what would be right.
        """
        for field in _fields(cls):
            within: Range | None = field.metadata.get("within")
            value = getattr(args, field.name)
            if within is not None and value is not None and not within.contains(value):
                raise ConfigurationError(f"{flag_of(field.name)} {value}: {within.describe()}")

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check the settings against batch, layout and model; called after :meth:`check`, when ``args`` are complete.

        Raises:
            ConfigurationError: Names the flag, the value and what would be right.
        """


def add_settings(
    parser: ArgumentParser, classes: Sequence[type[Settings]], choices: Mapping[str, Sequence[str]]
) -> None:
    """Add a group of flags to ``parser`` for each of ``classes``.

    Args:
        parser: Megatron's parser.
        classes: The settings classes.
        choices: The allowed values of arguments that a registry defines, by argument name.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory  # imported here: accelerator.activate() first

    class GroupFactory(ArgumentGroupFactory):
        """Megatron's factory, extended by mappings, switches and the choices of registries."""

        def _extract_type(self, config_type: Any) -> dict[str, Any]:
            # A mapping is one word on the command line, which the ``parse`` function of the field reads.
            return {"type": str} if typing.get_origin(config_type) is dict else super()._extract_type(config_type)

        def _build_argparse_kwargs_from_field(self, attribute: dataclasses.Field[Any]) -> dict[str, Any]:
            options: dict[str, Any] = super()._build_argparse_kwargs_from_field(attribute)
            if attribute.name in choices:
                options["choices"] = list(choices[attribute.name])
            options["help"] = options["help"].replace("%", "%%")  # argparse formats help texts with the % operator
            if "action" in options:  # argparse accepts no type for a switch
                options.pop("type", None)
            if options.get("action") is argparse.BooleanOptionalAction:
                options["arg_names"] = [flag_of(attribute.name)]
            return options

    for cls in classes:
        title, _, description = (cls.__doc__ or cls.__name__).partition(":")
        group = GroupFactory(cls).build_group(parser, " ".join(title.split()))
        group.description = " ".join(description.split()) or None


def flag_of(name: str) -> str:
    """Return the flag of an argument, such as ``--lr-decay-iters`` for ``lr_decay_iters``."""
    return "--" + name.replace("_", "-")


def _fields(cls: type[Settings]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]  # every subclass is a dataclass
