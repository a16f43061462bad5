"""Reads the small files of a model folder, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from fiddler.errors import CheckpointError


def read_text(path: Path) -> str:
    """Return the UTF-8 text of ``path``; :class:`CheckpointError` if that fails."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, or an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}",
            hint="the file is damaged; copy or download it again",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where an object is needed")
    return value


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the named special tokens of a model folder, such as ``{"eos_token": "</s>"}``.

    ``tokenizer_config.json`` wins over the older ``special_tokens_map.json``.
    """
    older = read_json_object(folder / "special_tokens_map.json")
    newer = read_json_object(folder / "tokenizer_config.json")
    found: dict[str, str] = {}
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        for source in (newer, older):
            text = _token_text(source.get(f"{name}_token"))
            if text is not None:
                found.setdefault(f"{name}_token", text)
    return found


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
