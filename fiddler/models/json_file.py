"""Reading the JSON files that a model folder must have."""

from pathlib import Path
from typing import Any

from fiddler.errors import CheckpointError
from fiddler.text.model_files import read_json_object


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; a missing or damaged file is a :class:`CheckpointError`."""
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {path.name}",
            hint="a model folder holds the files of one hub repository",
        )
    return read_json_object(path)
