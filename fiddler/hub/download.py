"""Fetches files into the cache: in parallel, resumed where they stopped, checked by their hash.

``huggingface_hub`` links what it finds in the cache but throws away a part of a file when it is
interrupted, and does not look at hashes; with shards of 5 GB both matter.
"""

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from fiddler.errors import HubError
from fiddler.hub.cache import RepoCache
from fiddler.hub.listing import RepoFile
from fiddler.hub.names import HubName
from fiddler.hub.options import HubOptions, Progress

NUM_THREADS = 8
CHUNK_BYTES = 1 << 20
MAX_TRIES = 5  # in a row without a single new byte
RETRY_S = 1.0
READ_TIMEOUT_S = 30.0
_BUSY = (408, 429, 500, 502, 503, 504)


class Stopped(Exception):
    """Another file failed, or the user interrupted: give up between two chunks."""


class Meter:
    """Counts the bytes that are there, over all files, and reports them.

    Ordering: one lock around counting and reporting, so reports come one at a time and in order.
    """

    def __init__(self, what: str, report: Progress | None, done: int, total: int) -> None:
        self._what, self._report = what, report
        self._done, self._total = done, total
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.add(0)

    def add(self, num_bytes: int) -> None:
        """Count bytes (negative: thrown away); raises :class:`Stopped` once ``stop`` is set."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._done += num_bytes
            if self._report is not None:
                self._report(self._what, self._done, self._total)


def fetch(
    files: Iterable[RepoFile], cache: RepoCache, name: HubName, hub: HubOptions, what: str
) -> None:
    """Bring the contents of ``files`` into the cache, verified; ``what`` names them in reports.

    What has arrived stays there whatever happens, and the next call goes on behind it. Files that
    the hub gives no hash for, or that are too large for plain HTTP, are left to the library.
    """
    wanted = [file for file in files if cache.can_hold(file) and file.size <= _max_bytes()]
    done = sum(cache.num_bytes(file) for file in wanted)
    meter = Meter(what, hub.progress, done, sum(file.size for file in wanted))
    missing = [file for file in wanted if not cache.has(file)]
    if not missing:
        return
    with ThreadPoolExecutor(min(NUM_THREADS, len(missing))) as threads:
        try:
            jobs = [threads.submit(_fetch_file, f, cache, name, hub, meter) for f in missing]
            _wait(jobs, meter)
        except BaseException:  # Ctrl-C too: threads stop at their next chunk, parts stay
            meter.stop.set()
            raise


def _wait(jobs: list[Future[None]], meter: Meter) -> None:
    """Wait for all; after the first failure stop the others, then raise it."""
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    failed = [job for job in done if job.exception() is not None]
    if failed:
        meter.stop.set()
        failed[0].result()


def _fetch_file(
    file: RepoFile, cache: RepoCache, name: HubName, hub: HubOptions, meter: Meter
) -> None:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    blob, part, lock = cache.blob(file), cache.part(file), cache.lock(file)
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    before = cache.num_bytes(file)
    with WeakFileLock(lock):
        meter.add(cache.num_bytes(file) - before)  # another process may have brought more
        if cache.has(file):
            return
        cache.drop_damaged(file)
        _fill(part, file, _url(file, cache, hub), hub, meter)
        _verify(part, file, name, meter)
        part.replace(blob)


def _fill(part: Path, file: RepoFile, url: str, hub: HubOptions, meter: Meter) -> None:
    """Append to ``part`` until it is complete; a try that brought bytes is not a failed one."""
    if _size(part) > file.size:
        part.unlink()
    part.touch()
    tries = 0
    while (size := _size(part)) < file.size:
        try:
            _append(part, size, file.size, url, hub, meter)
        except Exception as error:
            tries = 1 if _size(part) > size else tries + 1
            if not _is_transient(error) or tries >= MAX_TRIES:
                raise
            meter.stop.wait(RETRY_S)


def _append(part: Path, have: int, size: int, url: str, hub: HubOptions, meter: Meter) -> None:
    """Ask for the bytes from ``have`` on and write what comes."""
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = build_hf_headers(token=hub.token, library_name="fiddler")
    headers["Accept-Encoding"] = "identity"  # ranges count the file's own bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    # The token is dropped when the hub redirects to another host.
    with get_session().stream("GET", url, headers=headers, timeout=READ_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        is_rest = response.status_code == httpx2.codes.PARTIAL_CONTENT
        with part.open("ab" if is_rest else "wb") as out:
            meter.add(0 if is_rest else -have)
            for chunk in response.iter_bytes(CHUNK_BYTES):
                out.write(chunk)
                meter.add(len(chunk))
    if _size(part) < size:
        raise httpx2.RemoteProtocolError(f"the answer ended after {_size(part)} of {size} bytes")


def _verify(part: Path, file: RepoFile, name: HubName, meter: Meter) -> None:
    """Throw the content away and raise :class:`HubError` if its hash is not what the hub says."""
    if _digest(part, file) == file.etag:
        return
    meter.add(-_size(part))
    part.unlink()
    raise HubError(
        f"{file.path} of {name} arrived damaged: its checksum is not the one that the hub gives",
        hint="run the same command again; the file was thrown away and the others are kept",
    )


def _digest(path: Path, file: RepoFile) -> str:
    if file.sha256 is not None:
        with path.open("rb") as large:
            return hashlib.file_digest(large, "sha256").hexdigest()
    content = path.read_bytes()  # small, or it would have a sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _is_transient(error: Exception) -> bool:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _BUSY
    return isinstance(
        error, (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    )


def _url(file: RepoFile, cache: RepoCache, hub: HubOptions) -> str:
    from huggingface_hub import hf_hub_url

    url: str = hf_hub_url(cache.repo, file.path, revision=cache.commit, endpoint=hub.site)
    return url


def _max_bytes() -> int:
    from huggingface_hub import constants

    return constants.MAX_HTTP_DOWNLOAD_SIZE  # 50 GB: beyond, the hub serves no plain HTTP


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
