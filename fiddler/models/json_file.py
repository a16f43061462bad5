"""Reading the JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from fiddler.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; a missing or damaged file is a :class:`CheckpointError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}",
            hint="a model folder holds the files of one hub repository",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
