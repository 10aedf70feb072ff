"""Reader of the JSON files of a model's folder."""

import json
from pathlib import Path
from typing import Any

from megatron_camopd.errors import ConfigurationError


def read_json_object(path: Path, expected: str) -> dict[str, Any]:
    """Read the JSON object in the file ``path``.

    Args:
        path: The file.
        expected: What the file should be, for the error text, as in "the model's config.json".

    Raises:
        ConfigurationError: The file is absent, unreadable, no regular file, not JSON, nested too deeply, or holds
            something other than an object; the line names it.
    """
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path}: is no file; expected {expected}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; expected {expected}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigurationError(f"{path}: cannot be read ({reason[:160]}); expected {expected}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: holds a JSON {type(value).__name__}; expected {expected}, an object")
    return value
