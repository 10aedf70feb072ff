"""JSON texts of rows: parsed, and checked for what is valid JSON and yet no usable row.

A key that one JSON object holds twice is refused: which of its values counts would depend on the reader. The check
takes about a tenth of the time of reading.
"""

import json
import re
from collections import Counter
from typing import Any

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class KeyGivenTwiceError(Exception):
    """A JSON object that holds ``key`` twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose keys are all different."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise KeyGivenTwiceError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # shared: to make one for each text takes longer


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        KeyGivenTwiceError: an object holds a key twice.
        ValueError, RecursionError: the text is not JSON, or nested too deeply.
    """
    return _DECODER.decode(text)


def check_surrogates(text: str, values: Any) -> None:
    """Check that ``values``, parsed from the JSON ``text``, has no lone surrogates.

    Half of a surrogate pair is valid JSON but not valid text, and tokenizers would reject it hours later.

    Raises:
        UnicodeError: there is a lone surrogate.
    """
    if _SURROGATE_ESCAPE.search(text):
        json.dumps(values, ensure_ascii=False).encode("utf-8")


def without_nulls(value: Any) -> Any:
    """Drop null fields at every depth; nulls in lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
