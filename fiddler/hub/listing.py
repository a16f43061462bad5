"""What a repository holds, and which of its files a model needs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fiddler.errors import CheckpointError, HubError
from fiddler.hub.names import HubName
from fiddler.hub.options import HubOptions

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA_PATTERNS = ("*.json", "tokenizer*", "*.jinja", "additional_chat_templates/*.jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a commit. Large files have a ``sha256``, small ones the git blob's id."""

    path: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def etag(self) -> str | None:
        """The name of its content in the cache."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of one commit."""

    commit: str
    files: Mapping[str, RepoFile]

    @property
    def metadata(self) -> list[RepoFile]:
        """Configuration, tokenizer and templates: what is small and comes first."""
        return [f for f in self.files.values() if _is_metadata(f.path)]

    def weights(self, folder: Path) -> list[RepoFile]:
        """The weight files, by the index in ``folder`` if the repository has one.

        Raises :class:`HubError` if the index names a file that the repository lacks.
        """
        names = weight_names(folder)
        missing = [name for name in names if name not in self.files]
        if missing:
            raise HubError(
                f"{INDEX} names {missing[0]}, which the repository does not have",
                hint="the repository is incomplete; take another revision or another one",
            )
        return [self.files[name] for name in names]


def remote_listing(name: HubName, hub: HubOptions) -> Listing:
    """Ask the hub; one request."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=hub.site, token=hub.token, library_name="fiddler").model_info(
        name.repo, revision=name.revision, timeout=_TIMEOUT_S, files_metadata=True
    )
    files = [
        RepoFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
    ]
    assert info.sha is not None
    return Listing(info.sha, {file.path: file for file in files})


def refuse_unusable(listing: Listing, name: HubName) -> None:
    """Raise :class:`HubError` for a repository without safetensors, saying what it has instead."""
    at_root = [path for path in listing.files if "/" not in path]
    if INDEX in at_root or SINGLE in at_root:
        return
    pickle = _first_with_suffix(at_root, _PICKLES)
    gguf = _first_with_suffix(listing.files, (".gguf",))
    if pickle:
        raise HubError(
            f"{name} has its weights only as {pickle}, a pickle, which can run code when loaded",
            hint="take a revision or a repository with safetensors weights",
        )
    if gguf:
        raise HubError(
            f"{name} has its weights only as GGUF ({gguf}), which fiddler does not read",
            hint="take the safetensors repository that it was made from",
        )
    other = _first_with_suffix(at_root, (".safetensors",))
    found = f", only {other}" if other else ""
    raise HubError(f"{name} has neither {SINGLE} nor {INDEX}{found}")


def weight_names(folder: Path) -> list[str]:
    """Names of the weight files that ``folder`` has or should have."""
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    try:
        shards: set[Any] = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of weights: {error}") from error
    if not shards or not all(isinstance(s, str) and Path(s).name == s for s in shards):
        raise CheckpointError(f"{index} does not name the files of the weights")
    return sorted(shards)


def _is_metadata(path: str) -> bool:
    return any(
        fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")
        for pattern in METADATA_PATTERNS
    )


def _first_with_suffix(paths: Iterable[str], suffixes: tuple[str, ...]) -> str | None:
    return next((path for path in sorted(paths) if path.endswith(suffixes)), None)
