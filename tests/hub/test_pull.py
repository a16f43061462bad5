"""Pulling a model: what is fetched, resumed, verified, and what a full disk does."""

import errno
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_hub import SHARD, UNWANTED, FakeHub, Repo, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fiddler.errors import HubError
from fiddler.hub import ModelFolder, cache, download, fetch_metadata, resolve_model

Pull = Callable[..., ModelFolder]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: body for name, body in files.items() if name not in UNWANTED}


def part_of(cache_dir: Path) -> Path:
    return next(cache_dir.rglob("*.incomplete"))


# --- what is fetched ---


def test_a_sharded_model_arrives_whole_and_without_what_nobody_needs(
    hub: FakeHub, pull: Pull
) -> None:
    folder = pull()
    assert contents(folder.path) == wanted(hub.repos["acme/moe"].files)
    assert (folder.name, folder.revision) == ("acme/moe", "c" * 40)


def test_a_model_in_one_file(hub: FakeHub, pull: Pull) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x" * 5000}
    hub.repos["acme/small"] = Repo(files)
    assert contents(pull("acme/small").path) == files


def test_a_second_pull_asks_once_and_fetches_nothing(hub: FakeHub, pull: Pull) -> None:
    first = pull()
    hub.requests.clear()
    assert pull() == first
    assert [r.path for r in hub.requests] == ["/api/models/acme/moe"]


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "c" * 40])
def test_a_revision_may_be_a_tag_a_request_or_a_commit(
    hub: FakeHub, pull: Pull, revision: str
) -> None:
    hub.repos["acme/moe"].branches = ("main", "v1.0", "refs/pr/1")
    by_name = pull(f"acme/moe@{revision}")
    assert by_name.revision == "c" * 40
    assert pull(revision=revision, offline=True) == by_name


def test_a_new_commit_is_fetched_and_shares_what_did_not_change(hub: FakeHub, pull: Pull) -> None:
    old = pull()
    repo = hub.repos["acme/moe"]
    repo.commit, repo.files["config.json"] = "d" * 40, b'{"model_type": "olmoe"}'
    hub.requests.clear()
    new = pull()
    assert contents(new.path) == wanted(repo.files) != contents(old.path)
    assert not hub.bodies(SHARD)


def test_progress_never_goes_back_and_ends_at_the_total(hub: FakeHub, pull: Pull) -> None:
    reports: list[tuple[str, int, int]] = []
    pull(progress=lambda *report: reports.append(report))
    files = hub.repos["acme/moe"].files
    for what in ("configuration of acme/moe", "weights of acme/moe"):
        done = [d for w, d, _ in reports if w == what]
        totals = {total for w, _, total in reports if w == what}
        assert done == sorted(done)
        assert {done[-1]} == totals
    assert reports[-1][2] == sum(len(b) for n, b in files.items() if n.startswith("model-"))


def test_bytes_that_come_twice_are_counted_once(hub: FakeHub, pull: Pull) -> None:
    hub.ignores_ranges = True
    hub.cut_after[SHARD] = [20_480, 8192]
    reports: list[tuple[int, int]] = []
    pull(progress=lambda _, done, total: reports.append((done, total)))
    assert reports[-1] == (150_000, 150_000)
    assert all(done <= total for done, total in reports)


def test_two_pulls_at_once_fetch_every_file_once(hub: FakeHub, pull: Pull) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: pull(), range(2))
    assert first == second
    assert contents(first.path) == wanted(hub.repos["acme/moe"].files)
    assert len(hub.bodies(SHARD)) == 1


# --- interruptions ---


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    cuts=st.lists(st.integers(0, 49_999), max_size=4),
    ignores_ranges=st.booleans(),
    earlier=st.integers(0, 60_000),
)
def test_the_content_is_right_wherever_the_connection_is_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], ignores_ranges: bool, earlier: int
) -> None:
    files = {"config.json": b"{}", "model.safetensors": bytes(range(250)) * 200}
    hub = FakeHub(
        repos={"acme/moe": Repo(files)},
        cut_after={"model.safetensors": cuts},
        ignores_ranges=ignores_ranges,
    )
    root = tmp_path_factory.mktemp("cache")
    part = root / "models--acme--moe" / "blobs"
    part.mkdir(parents=True)
    etag = hub.repos["acme/moe"].etag("model.safetensors")
    # what an earlier run left: a correct beginning, or a file that is too long to be one
    (part / f"{etag}.incomplete").write_bytes((files["model.safetensors"] * 2)[:earlier])
    with pytest.MonkeyPatch.context() as patch, serve(hub):
        patch.setattr(download, "RETRY_S", 0.0)
        patch.setattr(download, "CHUNK_BYTES", 1000)
        folder = resolve_model("acme/moe", endpoint=hub.endpoint, cache_dir=root)
    assert contents(folder.path) == files


def test_a_cut_connection_is_taken_up_where_it_broke(hub: FakeHub, pull: Pull) -> None:
    hub.cut_after[SHARD] = [20_480, 8192]
    folder = pull()
    assert contents(folder.path) == wanted(hub.repos["acme/moe"].files)
    assert hub.bodies(SHARD) == [None, "bytes=20480-", "bytes=28672-"]


def test_a_pull_that_gave_up_is_taken_up_by_the_next(
    hub: FakeHub, pull: Pull, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_TRIES", 1)
    hub.cut_after[SHARD] = [20_480]
    with pytest.raises(HubError, match=r"cannot be reached: .*peer closed") as failure:
        pull()
    assert "continues where it stopped" in failure.value.hint
    assert part_of(cache_dir).stat().st_size == 20_480
    hub.requests.clear()
    assert contents(pull().path) == wanted(hub.repos["acme/moe"].files)
    assert hub.bodies(SHARD) == ["bytes=20480-"]
    assert not list(cache_dir.rglob("*.incomplete"))


def test_ctrl_c_stops_all_files_and_keeps_what_came(
    hub: FakeHub, pull: Pull, cache_dir: Path
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("weights") and done > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(progress=interrupt)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
    kept = sum(path.stat().st_size for path in cache_dir.rglob("*.incomplete"))
    assert kept > 0
    reports: list[int] = []
    folder = pull(
        progress=lambda what, done, _: reports.append(done) if "weights" in what else None
    )
    assert reports[0] >= kept
    assert contents(folder.path) == wanted(hub.repos["acme/moe"].files)


def test_a_busy_hub_is_asked_again(
    hub: FakeHub, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.busy[SHARD] = 3
    assert contents(pull().path) == wanted(hub.repos["acme/moe"].files)


# --- damage ---


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json", "config.json"])
def test_a_damaged_file_is_named_and_thrown_away(
    hub: FakeHub, pull: Pull, cache_dir: Path, name: str
) -> None:
    right = hub.repos["acme/moe"].files[name]
    hub.corrupt[name] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(HubError, match=f"{name} of acme/moe arrived damaged"):
        pull()
    assert not [
        p for p in cache_dir.rglob("*") if p.is_file() and p.read_bytes() == hub.corrupt[name]
    ]
    hub.corrupt.clear()
    assert contents(pull().path) == wanted(hub.repos["acme/moe"].files)


def test_a_longer_answer_than_announced_is_damage_too(hub: FakeHub, pull: Pull) -> None:
    hub.corrupt[SHARD] = hub.repos["acme/moe"].files[SHARD] + b"more"
    with pytest.raises(HubError, match="arrived damaged"):
        pull()


def test_a_truncated_file_in_the_cache_is_fetched_again(hub: FakeHub, pull: Pull) -> None:
    folder = pull()
    (folder.path / SHARD).resolve().write_bytes(b"short")
    assert contents(pull().path) == wanted(hub.repos["acme/moe"].files)


def test_an_index_that_names_a_file_the_repository_lacks(hub: FakeHub, pull: Pull) -> None:
    del hub.repos["acme/moe"].files[SHARD]
    with pytest.raises(HubError, match=f"names {SHARD}, which the repository does not have"):
        pull()


# --- the disk ---


def test_too_little_space_is_found_before_any_weight_is_fetched(
    hub: FakeHub, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "free_bytes", lambda _: 60_000)
    with pytest.raises(
        HubError, match=r"acme/moe needs 0\.1\d MB more .* 0\.06 MB free"
    ) as failure:
        pull()
    assert "free 0.09 MB there" in failure.value.hint
    assert not hub.bodies(SHARD)


def test_what_is_here_already_needs_no_space(
    hub: FakeHub, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_TRIES", 1)
    hub.cut_after[SHARD] = [20_480]
    with pytest.raises(HubError):
        pull()
    monkeypatch.setattr(cache, "free_bytes", lambda _: 150_000 - 20_480)
    assert contents(pull().path) == wanted(hub.repos["acme/moe"].files)


def test_a_full_disk_keeps_what_came_and_says_what_is_missing(
    hub: FakeHub, pull: Pull, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", _open_on_a_full_disk(Path.open, room=30_000))
        with pytest.raises(
            HubError, match=r"is full: 0\.0\d MB of 0\.15 MB of acme/moe"
        ) as failure:
            pull()
    assert "free 0.1" in failure.value.hint
    hub.requests.clear()
    assert contents(pull().path) == wanted(hub.repos["acme/moe"].files)
    assert any(
        hub.bodies(name) != [None] for name in hub.repos["acme/moe"].files if "model-" in name
    )


def _open_on_a_full_disk(plain_open: Callable[..., Any], room: int) -> Callable[..., Any]:
    """``Path.open`` on a disk that takes ``room`` bytes of weights and then no more."""
    left = room

    def open_file(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        out = plain_open(path, mode, *args, **options)
        if len(path.name) < 64 or "r" in mode:  # only contents with a sha256 are weights
            return out
        plain_write = out.write

        def write(chunk: bytes) -> int:
            nonlocal left
            left -= len(chunk)
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(plain_write(chunk))

        proxy = _Proxy(out)
        proxy.write = write  # type: ignore[attr-defined]
        return proxy

    return open_file


class _Proxy:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# --- metadata alone ---


def test_metadata_comes_without_weights_and_with_their_size(hub: FakeHub, cache_dir: Path) -> None:
    found = fetch_metadata("acme/moe", endpoint=hub.endpoint, cache_dir=cache_dir)
    assert json.loads((found.folder.path / "config.json").read_text()) == {"model_type": "mixtral"}
    assert not list(found.folder.path.glob("*.safetensors"))
    assert (found.weight_bytes, found.missing_bytes) == (150_000, 150_000)


def test_metadata_of_a_pulled_model_misses_nothing(
    hub: FakeHub, pull: Pull, cache_dir: Path
) -> None:
    pull()
    hub.requests.clear()
    found = fetch_metadata("acme/moe", offline=True, cache_dir=cache_dir)
    assert (found.weight_bytes, found.missing_bytes) == (150_000, 0)
    assert not hub.requests
