"""A hub on this machine: serves repositories over HTTP as huggingface.co does, and can misbehave.

The routes are those that ``huggingface_hub`` calls: ``/api/models/REPO[/revision/REV]``,
``/api/models/REPO/tree/REV``, and ``/REPO/resolve/REV/PATH`` with HEAD, ranges, ETag and
X-Repo-Commit. Large files redirect to a "CDN", another host, as LFS files do.
"""

import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session

LFS_BYTES = 1000  # from this size on a file is an LFS file
SHARD = "model-00002-of-00003.safetensors"
UNWANTED = ("consolidated.safetensors", "onnx/config.json", "pytorch_model.bin", "README.md")


def sharded_files(num_shards: int = 3, shard_bytes: int = 50_000) -> dict[str, bytes]:
    """A repository in the hub's usual layout, with things in it that nobody needs."""
    noise = random.Random(0)
    names = [f"model-{i:05}-of-{num_shards:05}.safetensors" for i in range(1, num_shards + 1)]
    index = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(names)}}
    return {
        "config.json": b'{"model_type": "mixtral"}',
        "generation_config.json": b"{}",
        "tokenizer.json": noise.randbytes(3000),
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{name: noise.randbytes(shard_bytes) for name in names},
        **{name: noise.randbytes(2000) for name in UNWANTED},
    }


@dataclass
class Repo:
    """One repository: its files, and what is wrong with it."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    branches: tuple[str, ...] = ("main",)
    is_gated: bool = False
    is_private: bool = False
    token: str = "hf_good"

    def etag(self, path: str) -> str:
        body = self.files[path]
        if len(body) >= LFS_BYTES:
            return hashlib.sha256(body).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """The server's state, to be changed by a test while it runs."""

    repos: dict[str, Repo] = field(default_factory=dict)
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes per answer, then whole
    corrupt: dict[str, bytes] = field(default_factory=dict)  # what is really sent
    status: int | None = None  # answer everything so
    busy: dict[str, int] = field(default_factory=dict)  # how often to answer 503 first
    refused_tokens: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    requests: list["Request"] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.port}"  # another origin, which must not see tokens

    def bodies(self, name: str) -> list[str | None]:
        """The Range headers of all requests that were answered with content of ``name``."""
        route = "cdn" if self._is_large(name) else "resolve"
        return [
            r.range
            for r in self.requests
            if r.method == "GET" and f"/{route}/" in r.path and r.path.endswith("/" + name)
        ]

    def _is_large(self, name: str) -> bool:
        return any(len(repo.files.get(name, b"")) >= LFS_BYTES for repo in self.repos.values())


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the server on a free port until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        close_session()  # the client's open connections would keep the server's threads
        server.shutdown()
        thread.join()
        server.server_close()


_ROUTE = re.compile(r"(?:/api/models)?/([^/]+/[^/]+?)(?:/(revision|tree|resolve|cdn)/(.*))?")


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        if self.hub.status is not None:
            return self._fail(self.hub.status)
        if token in self.hub.refused_tokens:
            return self._fail(401, message="Invalid credentials in Authorization header")
        found = _ROUTE.fullmatch(path)
        repo = self.hub.repos.get(found[1]) if found else None
        is_cdn = bool(found) and found[2] == "cdn"  # signed addresses, which need no token
        has_access = is_cdn or (repo is not None and token == repo.token)
        if not found or repo is None or (repo.is_private and not has_access):
            return self._fail(401, "RepoNotFound" if token else None)
        is_api = path.startswith("/api/")
        revision, _, name = (found[3] or "main").partition("/")
        revision = found[3] or "main" if is_api else revision
        if revision not in (*repo.branches, repo.commit):
            return self._fail(404, "RevisionNotFound")
        if is_api:
            return self._json(_tree(repo) if found[2] == "tree" else _info(found[1], repo))
        if repo.is_gated and not has_access:
            return self._fail(403 if token else 401, "GatedRepo")
        if name not in repo.files:
            return self._fail(404, "EntryNotFound")
        if self.command == "GET" and self.hub.busy.get(name, 0) > 0:
            self.hub.busy[name] -= 1
            return self._fail(503)
        self._file(found[1], repo, name, is_cdn=is_cdn)

    def _file(self, repo_id: str, repo: Repo, name: str, *, is_cdn: bool) -> None:
        body = self.hub.corrupt.get(name, repo.files[name])
        headers = {"ETag": f'"{repo.etag(name)}"', "X-Repo-Commit": repo.commit}
        if len(repo.files[name]) >= LFS_BYTES and not is_cdn:
            headers |= {
                "Location": f"{self.hub.cdn}/{repo_id}/cdn/{repo.commit}/{name}",
                "X-Linked-ETag": f'"{repo.etag(name)}"',
                "X-Linked-Size": str(len(repo.files[name])),
            }
            return self._send(302, b"", headers)
        status, wanted = 200, self.headers.get("Range")
        if wanted and not self.hub.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
        self._send(status, body, headers, cut=self._cut(name))

    def _cut(self, name: str) -> int | None:
        cuts = self.hub.cut_after.get(name)
        return cuts.pop(0) if cuts and self.command == "GET" else None

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None = None, message: str | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, b"", {name: value for name, value in said.items() if value})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _info(repo_id: str, repo: Repo) -> dict[str, object]:
    return {
        "id": repo_id,
        "sha": repo.commit,
        "siblings": [_sibling(repo, path) for path in repo.files],
    }


def _sibling(repo: Repo, path: str) -> dict[str, object]:
    size = len(repo.files[path])
    sibling: dict[str, object] = {"rfilename": path, "size": size, "blobId": "b" * 40}
    if size >= LFS_BYTES:
        sibling["lfs"] = {"sha256": repo.etag(path), "size": size, "pointerSize": 134}
    else:
        sibling["blobId"] = repo.etag(path)
    return sibling


def _tree(repo: Repo) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for path, body in repo.files.items():
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(body)}
        if len(body) >= LFS_BYTES:
            entry |= {
                "oid": "b" * 40,
                "lfs": {"oid": repo.etag(path), "size": len(body), "pointerSize": 134},
            }
        else:
            entry["oid"] = repo.etag(path)
        entries.append(entry)
    return entries
