"""What the hub refuses or does not have, each as one sentence with a hint; and working offline."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import SHARD, FakeHub, Repo

from fiddler.errors import ConfigError, HubError
from fiddler.hub import ModelFolder, fetch_metadata

Pull = Callable[..., ModelFolder]
GONE = "http://127.0.0.1:9"  # nobody listens on the discard port


# --- access ---


def test_a_gated_model_wants_a_token_and_opens_with_it(hub: FakeHub, pull: Pull) -> None:
    hub.repos["acme/moe"].is_gated = True
    for token in (None, "hf_stranger"):
        with pytest.raises(HubError, match="acme/moe is gated") as failure:
            pull(token=token)
        assert f"{hub.endpoint}/acme/moe" in failure.value.hint
    assert pull(token="hf_good").revision


def test_the_token_is_not_shown_to_the_host_that_serves_the_files(hub: FakeHub, pull: Pull) -> None:
    pull(token="hf_good")
    by_host = {"/cdn/" in r.path: set[str | None]() for r in hub.requests}
    for request in hub.requests:
        by_host["/cdn/" in request.path].add(request.token)
    assert by_host == {True: {None}, False: {"hf_good"}}


def test_a_private_model_looks_like_none_at_all(hub: FakeHub, pull: Pull) -> None:
    hub.repos["acme/moe"].is_private = True
    with pytest.raises(HubError, match="no model acme/moe, or it is private") as failure:
        pull()
    assert "--token" in failure.value.hint
    assert pull(token="hf_good").revision


def test_a_wrong_token_is_named_as_the_cause(hub: FakeHub, pull: Pull) -> None:
    hub.refused_tokens.add("hf_old")
    with pytest.raises(HubError, match="does not accept the access token"):
        pull(token="hf_old")


@pytest.mark.parametrize(
    ("name", "near"),
    [("Qwen/Qwen3-30B-A3", "Qwen/Qwen3-30B-A3B"), ("zzz/qqq", None), ("acme/mo", "acme/moe")],
)
def test_an_unknown_model_brings_the_nearest_one_known(
    pull: Pull, name: str, near: str | None
) -> None:
    pull("acme/moe")  # so that it is in the cache
    with pytest.raises(HubError, match=f"the hub has no model {name}") as failure:
        pull(name)
    asked = failure.value.message.partition("did you mean ")[2].removesuffix("?")
    assert asked == (near or "")


def test_an_unknown_revision(pull: Pull) -> None:
    with pytest.raises(HubError, match="acme/moe has no revision v9"):
        pull("acme/moe@v9")


def test_a_revision_given_twice_must_be_the_same(pull: Pull) -> None:
    with pytest.raises(ConfigError, match="revision v1, the revision option for v2"):
        pull("acme/moe@v1", revision="v2")


@pytest.mark.parametrize(("status", "said"), [(403, "status 403"), (429, "too many requests")])
def test_other_refusals_give_their_status(hub: FakeHub, pull: Pull, status: int, said: str) -> None:
    hub.status = status
    with pytest.raises(HubError, match=said):
        pull()


# --- repositories without usable weights ---


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["pytorch_model.bin", "adapter.safetensors"], "only as pytorch_model.bin, a pickle"),
        (["moe-Q4_K_M.gguf"], r"only as GGUF \(moe-Q4_K_M.gguf\)"),
        (["consolidated.safetensors"], "neither .*, only consolidated.safetensors"),
        ([], "neither model.safetensors nor"),
    ],
)
def test_weights_that_are_not_safetensors_are_refused_unread(
    hub: FakeHub, pull: Pull, files: list[str], said: str
) -> None:
    hub.repos["acme/odd"] = Repo({"config.json": b"{}", **dict.fromkeys(files, b"x" * 5000)})
    with pytest.raises(HubError, match=said):
        pull("acme/odd")
    assert not [r for r in hub.requests if "/resolve/" in r.path]


# --- offline ---


def test_offline_takes_the_cached_copy_and_sends_nothing(hub: FakeHub, pull: Pull) -> None:
    online = pull()
    hub.requests.clear()
    assert pull(offline=True) == online
    assert not hub.requests


def test_offline_without_a_copy_says_how_to_get_one(hub: FakeHub, pull: Pull) -> None:
    with pytest.raises(HubError, match="acme/moe is not in the cache") as failure:
        pull(offline=True)
    assert "fiddler pull acme/moe" in failure.value.hint
    assert not hub.requests


def test_offline_with_metadata_only_counts_the_missing_files(
    hub: FakeHub, pull: Pull, cache_dir: Path
) -> None:
    fetch_metadata("acme/moe", endpoint=hub.endpoint, cache_dir=cache_dir)
    with pytest.raises(HubError, match="3 of 3 weight files of acme/moe are not in the cache"):
        pull(offline=True)


def test_offline_with_a_shard_missing(pull: Pull) -> None:
    (pull().path / SHARD).resolve().unlink()
    with pytest.raises(HubError, match=f"1 of 3 weight files .*{SHARD}"):
        pull(offline=True)


def test_a_copy_made_by_another_tool_has_no_list_of_files_and_will_do(pull: Pull) -> None:
    folder = pull()
    for listing in folder.path.parents[1].glob("trees/*"):
        listing.unlink()
    assert pull(offline=True) == folder


def test_a_hub_out_of_reach_is_replaced_by_the_cached_copy_and_that_is_said(
    hub: FakeHub, pull: Pull, caplog: pytest.LogCaptureFixture
) -> None:
    online = pull()
    hub.status = 503
    with caplog.at_level(logging.WARNING, "fiddler.hub"):
        assert pull() == online
    assert "using the cached copy of acme/moe" in caplog.text


def test_a_hub_out_of_reach_and_no_copy(cache_dir: Path) -> None:
    with pytest.raises(HubError, match=f"{GONE} cannot be reached: .+") as failure:
        fetch_metadata("acme/moe", endpoint=GONE, cache_dir=cache_dir)
    assert "when the connection is back" in failure.value.hint


def test_a_hub_that_answers_with_an_error_and_no_copy(hub: FakeHub, pull: Pull) -> None:
    hub.status = 500
    with pytest.raises(HubError, match="HTTP status 500"):
        pull()


def test_a_hub_that_never_answers(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.hub.listing._TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(HubError, match=r"cannot be reached: .*timed out"):
            fetch_metadata("acme/moe", endpoint=endpoint, cache_dir=cache_dir)


def test_a_cache_that_cannot_be_written(hub: FakeHub, pull: Pull, cache_dir: Path) -> None:
    cache_dir.write_text("a file where a folder should be")
    with pytest.raises(HubError, match="cannot be written"):
        pull()
