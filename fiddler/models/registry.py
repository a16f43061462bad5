"""From a model folder to its ``ModelConfig``: file name == ``model_type``. Imports no torch."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from fiddler.errors import CheckpointError
from fiddler.models.checkpoint import stored_dtype
from fiddler.models.config import ModelConfig
from fiddler.models.fields import RawConfig, integers
from fiddler.models.json_file import read_json
from fiddler.models.quantized import quantised_experts

ARCHITECTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def load_config(folder: Path | str) -> ModelConfig:
    """Read ``config.json``; ``generation_config.json`` may add ids that end a text."""
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    generation = load_generation_config(folder)
    ends = dict.fromkeys([*integers(raw, "eos_token_id"), *integers(generation, "eos_token_id")])
    if ends:
        raw["eos_token_id"] = list(ends)
    raw["dtype"] = stored_dtype(folder) or raw.get("dtype") or raw.get("torch_dtype")
    return parse_config(raw)


def load_generation_config(folder: Path | str) -> dict[str, Any]:
    """Return ``generation_config.json``, or an empty dict where the folder has none."""
    path = Path(folder) / "generation_config.json"
    return read_json(path) if path.exists() else {}


def parse_config(raw: RawConfig) -> ModelConfig:
    """Return the record of a parsed ``config.json``; what we do not compute is an error."""
    quantised = quantised_experts(raw)
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"unknown architecture {model_type!r}", hint=f"known ones: {', '.join(ARCHITECTURES)}"
        )
    architecture = importlib.import_module(f"fiddler.models.{model_type}")
    config: ModelConfig = architecture.config(raw)
    return replace(config, **quantised)
