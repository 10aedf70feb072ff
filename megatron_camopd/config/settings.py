"""Settings as typed dataclasses: from a field follow its flag, its help, its range and what a resumed run keeps.

A room declares what it can be told in a frozen dataclass derived from :class:`Settings`:

    @dataclass(frozen=True, kw_only=True)
    class HeadSettings(Settings):
        '''CaMOPD output head: log-probabilities and loss from the last hidden states.'''

        head_chunk: int = setting(64, within=at_least(1), kept=True)
        '''Tokens whose logits exist at once.'''

The class docstring is the group's title in ``--help``, a field's docstring the flag's help, its name the flag's name.
``HeadSettings.of(args)`` reads an instance from parsed arguments. Megatron's own ``ArgumentGroupFactory`` makes the
flags, so types, lists and ``Literal`` choices mean what they mean in Megatron's dataclasses.
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
    """The numbers that a setting may have; not a number and infinity are never among them.

    ``low`` and ``high`` belong to the range unless ``open_low`` or ``open_high``; None: no limit. ``words``: what an
    error says after the value, where the usual wording would be clumsy.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    words: str | None = None

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies in the range."""
        if not math.isfinite(value):
            return False
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        below = self.high is None or value < self.high or (value == self.high and not self.open_high)
        return above and below

    def describe(self) -> str:
        """Return what would be right, for an error: "must be at least 1"."""
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
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    **argparse_options: Any,
) -> Any:
    """Declare a field of a :class:`Settings` class.

    Args:
        default: its value where the flag is not given; lists and dictionaries are copied.
        within: the numbers allowed; None as a value means "not given" and is always allowed.
        kept: whether a resumed run must have the same value, since it would be another run otherwise.
        metavar: the value's name in ``--help``.
        parse: makes the value from the word on the command line, where the field's type does not say how.
        argparse_options: further options of ``add_argument``, which win over what follows from the field's type.
    """
    options = dict(argparse_options)
    if metavar is not None:
        options["metavar"] = metavar
    if parse is not None:
        options["type"] = parse
    metadata = {"argparse_meta": options, "within": within, "kept": kept}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def switch(default: bool, *, kept: bool = False) -> Any:
    """Declare a field with the flags ``--name`` and ``--no-name``."""
    return setting(default, kept=kept, action=argparse.BooleanOptionalAction)


class Settings:
    """Base of settings: a frozen dataclass whose fields are flags; see the module's docstring."""

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
        """Return the argument names of the fields that a resumed run keeps."""
        return tuple(field.name for field in _fields(cls) if field.metadata.get("kept"))

    @classmethod
    def check(cls, args: Namespace, given: Mapping[str, str]) -> None:
        """Check every number against its field's range; called where the settings count.

        A class that has more to check, or defaults that follow from other arguments, extends this and sets them in
        ``args``. ``given``: the flags on the command line, argument name -> flag as written.

        Raises:
            ConfigurationError: naming the flag, the value and what would be right.
        """
        for field in _fields(cls):
            within: Range | None = field.metadata.get("within")
            value = getattr(args, field.name)
            if within is not None and value is not None and not within.contains(value):
                raise ConfigurationError(f"{flag_of(field.name)} {value}: {within.describe()}")

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check the settings against batch, layout and model, which ``args`` state by now; called after :meth:`check`.

        Raises:
            ConfigurationError: naming the flag, the value and what would be right.
        """


def add_settings(
    parser: ArgumentParser, classes: Sequence[type[Settings]], choices: Mapping[str, Sequence[str]]
) -> None:
    """Add a group of flags to ``parser`` for each of ``classes``.

    ``choices``: the values of the arguments that a registry knows, by argument name.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory  # imported here: accelerator.activate() first

    class GroupFactory(ArgumentGroupFactory):
        """Megatron's factory, with mappings, switches and the choices of registries."""

        def _extract_type(self, config_type: Any) -> dict[str, Any]:
            # A mapping is one word; the field's own ``parse`` reads it.
            return {"type": str} if typing.get_origin(config_type) is dict else super()._extract_type(config_type)

        def _build_argparse_kwargs_from_field(self, attribute: dataclasses.Field[Any]) -> dict[str, Any]:
            options = super()._build_argparse_kwargs_from_field(attribute)
            if attribute.name in choices:
                options["choices"] = list(choices[attribute.name])
            options["help"] = options["help"].replace("%", "%%")  # argparse fills in what follows a bare one
            if "action" in options:  # switches take no value
                options.pop("type", None)
            if options.get("action") is argparse.BooleanOptionalAction:
                options["arg_names"] = [flag_of(attribute.name)]
            return options

    for cls in classes:
        title, _, description = (cls.__doc__ or cls.__name__).partition(":")
        group = GroupFactory(cls).build_group(parser, " ".join(title.split()))
        group.description = " ".join(description.split()) or None


def flag_of(name: str) -> str:
    """Return the flag of an argument name: ``lr_decay_iters`` -> ``--lr-decay-iters``."""
    return "--" + name.replace("_", "-")


def _fields(cls: type[Settings]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]  # every subclass is a dataclass
