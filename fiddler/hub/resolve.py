"""The two questions that the rest of fiddler asks: where is this model, and how large is it."""

from dataclasses import dataclass
from pathlib import Path

from fiddler.config import BUILTIN
from fiddler.errors import CheckpointError, ConfigError
from fiddler.hub.failures import explained
from fiddler.hub.listing import weight_names
from fiddler.hub.names import not_a_folder, parse_hub_name
from fiddler.hub.options import HubOptions, Progress
from fiddler.hub.snapshot import open_snapshot, pull_weights

BUILTIN_FOLDER = Path(__file__).resolve().parents[1] / "assets" / BUILTIN


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's files. ``revision`` is the commit for a model of the hub, else None."""

    path: Path
    name: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model whose weights may not be here yet; everything else is in ``folder``.

    ``weight_bytes`` is what all weight files take, ``missing_bytes`` what of it is not here.
    """

    folder: ModelFolder
    weight_bytes: int
    missing_bytes: int


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> ModelFolder:
    """Return the folder of ``builtin``, of a local folder, or of ``ORG/NAME[@REVISION]``.

    A model of the hub is pulled first if it is not in the cache: the disk space is checked before,
    an interrupted pull goes on where it stopped, every file is verified. An existing folder wins
    over a name on the hub. ``progress(what, done_bytes, total_bytes)`` is called from threads, one
    call at a time. Raises :class:`ConfigError` for what cannot be a model,
    :class:`CheckpointError` for a folder that is none, :class:`HubError` for the rest.
    """
    local = _find_local(model, revision)
    if local is not None:
        return local
    hub = HubOptions(
        token=token, offline=offline, progress=progress, endpoint=endpoint, cache_dir=cache_dir
    )
    name = parse_hub_name(model, revision, hub.cache)
    with explained(name, hub):
        snapshot = open_snapshot(name, hub)
        pull_weights(snapshot)
        return ModelFolder(snapshot.folder, name.repo, snapshot.listing.commit)


def fetch_metadata(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> ModelMetadata:
    """As :func:`resolve_model`, but download no weights: configuration and tokenizer only."""
    local = _find_local(model, revision)
    if local is not None:
        weights = [local.path / name for name in weight_names(local.path)]
        return ModelMetadata(local, sum(p.stat().st_size for p in weights if p.is_file()), 0)
    hub = HubOptions(
        token=token, offline=offline, progress=progress, endpoint=endpoint, cache_dir=cache_dir
    )
    name = parse_hub_name(model, revision, hub.cache)
    with explained(name, hub):
        snapshot = open_snapshot(name, hub)
        return ModelMetadata(
            ModelFolder(snapshot.folder, name.repo, snapshot.listing.commit),
            weight_bytes=sum(file.size for file in snapshot.weights),
            missing_bytes=sum(
                file.size - snapshot.cache.num_bytes(file) for file in snapshot.weights
            ),
        )


def _find_local(model: str, revision: str | None) -> ModelFolder | None:
    """The packaged model or an existing folder; None if ``model`` is nothing on this machine."""
    is_builtin = model == BUILTIN
    path = BUILTIN_FOLDER if is_builtin else Path(model)
    if model.startswith("~/"):
        path = path.expanduser()
    if not is_builtin and path.is_file():
        raise not_a_folder(model, path)
    if not is_builtin and not (model and path.is_dir()):
        return None
    if revision is not None:
        raise ConfigError(f"{model} is on this machine and has no revision {revision}")
    _check_folder(path, is_builtin=is_builtin)
    return ModelFolder(path, BUILTIN if is_builtin else path.resolve().name, None)


def _check_folder(path: Path, *, is_builtin: bool) -> None:
    if (path / "config.json").is_file():
        return
    if is_builtin:
        raise CheckpointError(
            "this installation of fiddler lacks its built-in model", hint="install it again"
        )
    gguf = next((p.name for p in sorted(path.glob("*.gguf"))), None)
    raise CheckpointError(
        f"{path} has no config.json" + (f", only {gguf}" if gguf else ""),
        hint="GGUF is not supported; take the safetensors repository of the same model"
        if gguf
        else "a model folder holds config.json, tokenizer.json and *.safetensors",
    )
