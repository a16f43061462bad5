"""What a user may call a model, and the nearest known name when it is none."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fiddler.config import BUILTIN
from fiddler.errors import ConfigError

KNOWN_MODELS = (
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat",
    "Qwen/Qwen2-57B-A14B-Instruct",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "allenai/OLMoE-1B-7B-0924-Instruct",
)
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_ADDRESS = re.compile(rf"(?:https?://)?(?:www\.)?(?:hf|huggingface)\.co/({_REPO.pattern}).*")
_TAGGED = re.compile(rf"({_REPO.pattern}):[\w.-]+")
_READS = "fiddler reads a folder of safetensors or ORG/NAME[@REVISION] on the hub, and no"
_FILES = {".gguf": "GGUF", ".safetensors": "single file"}  # how their names end
_FORMS = "a model is 'builtin', a folder, or ORG/NAME[@REVISION] on the hub"


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the hub; ``revision`` None is its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_name(model: str, revision: str | None, cache: Path) -> HubName:
    """Read ``ORG/NAME[@REVISION]``; anything else is a :class:`ConfigError` with the nearest name.

    ``revision`` is the option of that name; it may repeat what the model says, not contradict it.
    """
    for ending, kind in _FILES.items():  # with one slash it could be a repository's name
        if model.lower().endswith(ending):
            raise ConfigError(f"there is no file {model}", hint=f"{_READS} {kind}")
    repo, _, inline = model.partition("@")
    if not _REPO.fullmatch(repo):
        raise _not_a_name(model, cache)
    if revision and inline and revision != inline:
        raise ConfigError(f"{model} asks for revision {inline}, the revision option for {revision}")
    return HubName(repo, revision or inline or None)


def suggestion(name: str, cache: Path) -> str:
    """Return ``"; did you mean X?"`` for the nearest known or cached model, or an empty string."""
    known = [BUILTIN, *_cached_repos(cache), *KNOWN_MODELS]
    close = _nearest(name.lower(), [model for model in known if model != name])
    return f"; did you mean {close}?" if close else ""


def not_a_folder(model: str, path: Path) -> ConfigError:
    """``model`` is a file on this machine."""
    hint = f"name the folder it is in: {path.parent}"
    if path.suffix.lower() == ".gguf":
        hint = "GGUF is not supported; take the safetensors repository of the same model"
    return ConfigError(f"{model} is a file, not a model folder", hint=hint)


def _not_a_name(model: str, cache: Path) -> ConfigError:
    if address := _ADDRESS.fullmatch(model):
        hint = f"give the name alone: {address[1]}"
        return ConfigError(f"{model} is an address, not a name", hint=hint)
    if tagged := _TAGGED.fullmatch(model):
        hint = f"give {tagged[1]} alone; --dtype w4g128 keeps its experts in 4 bits"
        return ConfigError(f"{model} has a tag, as GGUF files have", hint=hint)
    if "/" in model or "\\" in model or model.startswith((".", "~")):
        return ConfigError(f"there is no folder {model}", hint=_FORMS)
    return ConfigError(f"there is no model {model!r}{suggestion(model, cache)}", hint=_FORMS)


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Compare with whole names and with the part after the slash; a part of a name will do."""
    by_key = {key.lower(): model for model in known for key in (model.split("/")[-1], model)}
    close = difflib.get_close_matches(name, by_key, n=1, cutoff=0.6)
    close += [key for key in by_key if name and name in key]
    return by_key[close[0]] if close else None


def _cached_repos(cache: Path) -> list[str]:
    folders = sorted(path.name for path in cache.glob("models--*--*"))
    return [name.removeprefix("models--").replace("--", "/", 1) for name in folders]
