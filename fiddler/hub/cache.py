"""Where one repository lives in the hub's cache, in the layout of ``huggingface_hub``."""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fiddler.errors import HubError
from fiddler.hub.listing import RepoFile
from fiddler.hub.names import HubName

_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RepoCache:
    """Paths of one commit of one repository.

    Contents are ``blobs/<etag>``; a file under ``snapshots/<commit>`` is a link to one. A content
    that is still coming is ``blobs/<etag>.incomplete`` and survives an interruption.
    """

    root: Path
    repo: str
    commit: str

    @property
    def folder(self) -> Path:
        """The repository's folder."""
        return self.root / f"models--{self.repo.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        """The commit's folder."""
        return self.folder / "snapshots" / self.commit

    def blob(self, file: RepoFile) -> Path:
        """The finished content."""
        assert file.etag is not None and _ETAG.fullmatch(file.etag), "checked by can_hold"
        return self.folder / "blobs" / file.etag

    def part(self, file: RepoFile) -> Path:
        """The content so far."""
        return self.blob(file).with_name(f"{file.etag}.incomplete")

    def lock(self, file: RepoFile) -> Path:
        """The lock that ``huggingface_hub`` takes for the same content."""
        return self.root / ".locks" / self.folder.name / f"{file.etag}.lock"

    def can_hold(self, file: RepoFile) -> bool:
        """Whether the hub names the content by a hash, so that it can be resumed and verified."""
        return file.etag is not None and _ETAG.fullmatch(file.etag) is not None

    def has(self, file: RepoFile) -> bool:
        """Whether the whole content is there."""
        paths = [self.snapshot / file.path, *([self.blob(file)] if self.can_hold(file) else [])]
        return any(_size(path) == file.size for path in paths)

    def num_bytes(self, file: RepoFile) -> int:
        """Bytes of the content that need not be fetched again."""
        if self.has(file):
            return file.size
        return min(file.size, _size(self.part(file)) or 0) if self.can_hold(file) else 0

    def drop_damaged(self, file: RepoFile) -> None:
        """Remove what claims to be the whole content and has another size."""
        for path in (self.snapshot / file.path, self.blob(file)):
            if _size(path) not in (None, file.size):
                path.unlink()


def check_space(cache: RepoCache, name: HubName, files: Iterable[RepoFile]) -> None:
    """Raise :class:`HubError` if what is still missing of ``files`` does not fit on the disk."""
    missing = sum(file.size - cache.num_bytes(file) for file in files)
    free = free_bytes(cache.root)
    if missing > free:
        raise HubError(
            f"{name} needs {gigabytes(missing)} more on the disk, but {cache.root} has"
            f" {gigabytes(free)} free",
            hint=f"free {gigabytes(missing - free)} there, or set HF_HOME to a folder elsewhere",
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that ``folder`` is or will be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gigabytes(size: int) -> str:
    """``size`` bytes for people: GB, or MB if it is small."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
