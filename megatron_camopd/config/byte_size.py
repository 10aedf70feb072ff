"""Parsing of sizes with units, such as 512MiB."""

import re
from argparse import ArgumentTypeError

from megatron_camopd.config.words import shown
from megatron_camopd.errors import ConfigurationError

_LARGEST = 2**63  # what counters of bytes hold
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, *, flag: str) -> int:
    """Return the number of bytes that ``text`` states.

    Args:
        text: A number, followed by KB, MB or GB (powers of 1000), by KiB, MiB or GiB (powers of 1024), or by nothing
            (bytes).
        flag: The flag to name in an error.

    Raises:
        ConfigurationError: ``text`` is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not 1 <= float(match.group(1)) * unit < _LARGEST:
        raise ConfigurationError(f"{flag} {shown(text)}: is no size; expected for example 4GB, 500MB or 2GiB")
    return int(float(match.group(1)) * unit)


def size_argument(text: str) -> int:
    """Parse a size as an argparse ``type``.

    Raises:
        ArgumentTypeError: ``text`` is not a size.
    """
    try:
        return parse_size(text, flag="SIZE")
    except ConfigurationError as error:
        raise ArgumentTypeError(str(error).removeprefix("SIZE ")) from error
