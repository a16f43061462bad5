"""What is known of a model before its weights are read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddler.config import EngineConfig
from fiddler.errors import PromptError
from fiddler.hub import ModelFolder, fetch_metadata, resolve_model
from fiddler.models.config import ModelConfig
from fiddler.models.registry import load_config, load_generation_config
from fiddler.models.shapes import SHAPES, load_shape
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # what is loaded, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What is known of a model before its weights are read; ``folder`` is None for a shape."""

    name: str
    revision: str | None
    folder: Path | None
    config: ModelConfig
    generation_config: dict[str, Any]
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None

    @property
    def needed_tokenizer(self) -> Tokenizer:
        """For a prompt or stop strings of text; raises PromptError where there is none."""
        if self.tokenizer is None:
            raise PromptError(f"{self.name} has no tokenizer", hint="give the prompt as token ids")
        return self.tokenizer


def find_model(settings: EngineConfig, on_progress: Progress | None = None) -> ModelFiles:
    """Find the model's files (downloading them if need be) and read all but the weights."""
    if settings.load_format == "dummy" and settings.model in SHAPES:
        return ModelFiles(
            name=settings.model,
            revision=None,
            folder=None,
            config=load_shape(settings.model),
            generation_config={},
            tokenizer=None,
            chat_template=None,
        )
    found = _find_folder(settings, on_progress)
    return ModelFiles(
        name=found.name,
        revision=found.revision,
        folder=found.path,
        config=load_config(found.path),
        generation_config=load_generation_config(found.path),
        tokenizer=_tokenizer(settings, found.path),
        chat_template=ChatTemplate.from_folder(found.path),
    )


def _tokenizer(settings: EngineConfig, folder: Path) -> Tokenizer | None:
    """Seeded weights need a configuration and nothing else."""
    if settings.load_format == "dummy" and not (folder / "tokenizer.json").exists():
        return None
    return Tokenizer.from_folder(folder)


def _find_folder(settings: EngineConfig, on_progress: Progress | None) -> ModelFolder:
    """Seeded weights need no download but the small files."""
    where: dict[str, Any] = {
        "revision": settings.revision,
        "token": settings.token,
        "offline": settings.offline,
        "progress": on_progress,
    }
    if settings.load_format == "dummy":
        return fetch_metadata(settings.model, **where).folder
    return resolve_model(settings.model, **where)
