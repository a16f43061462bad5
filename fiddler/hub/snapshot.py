"""Pulls one repository: list, check, fetch, link; or finds it in the cache."""

import errno
import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddler.errors import HubError
from fiddler.hub.cache import RepoCache, check_space, gigabytes
from fiddler.hub.download import fetch
from fiddler.hub.failures import is_unreachable, not_cached
from fiddler.hub.listing import Listing, RepoFile, refuse_unusable, remote_listing
from fiddler.hub.names import HubName
from fiddler.hub.options import HubOptions

_log = logging.getLogger("fiddler.hub")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of which at least the metadata is on this machine.

    ``offline_because`` is set if the hub did not answer and the cache stands in for it.
    """

    name: HubName
    hub: HubOptions
    listing: Listing
    offline_because: Exception | None = None

    @property
    def cache(self) -> RepoCache:
        """Where its files are."""
        return RepoCache(self.hub.cache, self.name.repo, self.listing.commit)

    @property
    def folder(self) -> Path:
        """The folder to load from."""
        return self.cache.snapshot

    @property
    def weights(self) -> list[RepoFile]:
        """The weight files, whether they are here or not."""
        return self.listing.weights(self.folder)

    @property
    def missing_weights(self) -> list[RepoFile]:
        """The weight files that are not here, or not whole."""
        return [file for file in self.weights if not self.cache.has(file)]


def open_snapshot(name: HubName, hub: HubOptions) -> Snapshot:
    """Bring the metadata (some MB), never the weights; from the cache if the hub is out of reach.

    Library exceptions pass; :func:`fiddler.hub.failures.explained` is for the caller.
    """
    if hub.is_offline:
        return Snapshot(name, hub, _cached_listing(name, hub))
    try:
        listing = remote_listing(name, hub)
    except Exception as error:
        if not is_unreachable(error):
            raise
        return _cached_instead(name, hub, error)
    refuse_unusable(listing, name)
    snapshot = Snapshot(name, hub, listing)
    _bring(snapshot, listing.metadata, f"configuration of {name.repo}")
    return snapshot


def pull_weights(snapshot: Snapshot) -> None:
    """Bring the weights, after checking that they fit on the disk."""
    missing = snapshot.missing_weights
    if missing and snapshot.offline_because is not None:
        raise snapshot.offline_because
    if missing and snapshot.hub.is_offline:
        raise HubError(
            f"{len(missing)} of {len(snapshot.weights)} weight files of {snapshot.name} are not in"
            f" the cache {snapshot.hub.cache} ({missing[0].path})",
            hint=f"run once without --offline: fiddler pull {snapshot.name}",
        )
    if snapshot.offline_because is None and not snapshot.hub.is_offline:
        _bring(snapshot, snapshot.weights, f"weights of {snapshot.name.repo}")


def _bring(snapshot: Snapshot, files: Sequence[RepoFile], what: str) -> None:
    check_space(snapshot.cache, snapshot.name, files)
    try:
        fetch(files, snapshot.cache, snapshot.name, snapshot.hub, what)
        if not _is_linked(snapshot, files):
            _link(snapshot, files)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _disk_full(snapshot, files) from error


def _is_linked(snapshot: Snapshot, files: Sequence[RepoFile]) -> bool:
    """Whether the folder has all ``files`` and the cache knows it by the revision's name."""
    try:
        commit = _cached_commit(snapshot.name, snapshot.hub)
    except HubError:
        return False
    is_known = commit == snapshot.listing.commit
    return is_known and all((snapshot.folder / file.path).is_file() for file in files)


def _link(snapshot: Snapshot, files: Sequence[RepoFile]) -> None:
    """Let the library make the snapshot's folder from what is in the cache, and note the commit."""
    from huggingface_hub import snapshot_download

    hub, name = snapshot.hub, snapshot.name
    folder = snapshot_download(
        name.repo,
        revision=name.revision,
        cache_dir=hub.cache,
        token=hub.token,
        endpoint=hub.site,
        library_name="fiddler",
        allow_patterns=[glob.escape(file.path) for file in files],
        tqdm_class=_silent_bar(),
    )
    lost = [file.path for file in files if not (Path(folder) / file.path).is_file()]
    if Path(folder).name != snapshot.listing.commit or lost:
        raise HubError(
            f"{name} changed on the hub while it was pulled", hint="run the same command again"
        )


def _disk_full(snapshot: Snapshot, files: Sequence[RepoFile]) -> HubError:
    here = sum(snapshot.cache.num_bytes(file) for file in files)
    total = sum(file.size for file in files)
    return HubError(
        f"the disk of {snapshot.hub.cache} is full: {gigabytes(here)} of {gigabytes(total)} of"
        f" {snapshot.name} have arrived",
        hint=f"free {gigabytes(total - here)} and run the same command again; it continues where"
        " it stopped",
    )


def _cached_instead(name: HubName, hub: HubOptions, error: Exception) -> Snapshot:
    try:
        snapshot = Snapshot(name, hub, _cached_listing(name, hub), offline_because=error)
    except HubError:
        raise error from None
    _log.warning("%s cannot be reached; using the cached copy of %s", hub.site, name)
    return snapshot


def _cached_listing(name: HubName, hub: HubOptions) -> Listing:
    """The commit that the cache has for ``name``, or :class:`HubError`."""
    commit = _cached_commit(name, hub)
    cache = RepoCache(hub.cache, name.repo, commit)
    listing = Listing(commit, {file.path: file for file in _cached_files(cache)})
    if not listing.metadata or not all(cache.has(file) for file in listing.metadata):
        raise not_cached(name, hub)
    return listing


def _cached_commit(name: HubName, hub: HubOptions) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    try:
        found = HfApi().resolve_revision(
            name.repo, revision=name.revision, cache_dir=hub.cache, local_files_only=True
        )
    except RevisionResolutionError:
        raise not_cached(name, hub) from None
    return str(found.resolved)


def _cached_files(cache: RepoCache) -> list[RepoFile]:
    """The hub's list of files as it was noted at the pull, or else the files that are there."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(cache.repo, revision=cache.commit, cache_dir=cache.root)
    except CachedRepoTreeNotFoundError:
        here = [path for path in cache.snapshot.rglob("*") if path.is_file()]
        return [
            RepoFile(path.relative_to(cache.snapshot).as_posix(), path.stat().st_size)
            for path in here
        ]
    return [RepoFile(file.path, file.size) for file in tree]


def _silent_bar() -> type[Any]:
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):  # type: ignore[misc]
        """Linking needs no bar of its own."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent
