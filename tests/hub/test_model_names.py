"""Names that need no hub: the packaged model, folders, and what is none of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fiddler.errors import CheckpointError, ConfigError
from fiddler.hub import ModelFolder, fetch_metadata, resolve, resolve_model

Pull = Callable[..., ModelFolder]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "my-moe"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"x" * 100)
    return model


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_model(str(folder)) == ModelFolder(folder, "my-moe", None)
    found = fetch_metadata(str(folder))
    assert (found.weight_bytes, found.missing_bytes) == (100, 0)


def test_a_folder_wins_over_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    found = resolve_model(f"{folder.parent.name}/{folder.name}")
    assert found.revision is None


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has no revision v1"):
        resolve_model(str(folder), revision="v1")


def test_a_home_folder_may_be_written_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(folder.parent))
    assert resolve_model("~/my-moe").path == folder


def test_the_packaged_model_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "BUILTIN_FOLDER", folder)
    assert resolve_model("builtin") == ModelFolder(folder, "builtin", None)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="lacks its built-in model"):
        resolve_model("builtin")


def test_a_folder_that_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve_model(str(folder))
    (folder / "moe.gguf").touch()
    with pytest.raises(CheckpointError, match=r"only moe\.gguf") as failure:
        resolve_model(str(folder))
    assert "GGUF is not supported" in failure.value.hint


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("bultin", "builtin"),
        ("mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B"),
        ("olmoe", "allenai/OLMoE-1B-7B-0924-Instruct"),
    ],
)
def test_a_name_without_a_slash_brings_the_nearest_model(
    name: str, near: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"there is no model '{name}'; did you mean {near}?"):
        resolve_model(name, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["./moe", "/no/such", "a/b/c", "..\\moe", "~/m", "~x/m", "a/..b@"])
def test_a_path_that_does_not_exist(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        resolve_model(name, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "typed",
    [
        *("https://huggingface.co/{}", "hf.co/{}", "https://huggingface.co/{}/tree/main"),
        *("huggingface.co/{}:Q4_K_M", "{}:Q4_K_M", "{}:latest"),
    ],
)
def test_how_other_programs_name_a_model(typed: str, tmp_path: Path) -> None:
    name = "Qwen/Qwen3-30B-A3B"
    with pytest.raises(ConfigError, match=r"is an address, not a name|has a tag") as failure:
        resolve_model(typed.format(name), endpoint="http://127.0.0.1:9", cache_dir=tmp_path)
    assert name in failure.value.hint.split()


@pytest.mark.parametrize("at", ["models/moe{}", "moe{}", "./moe{}", "a/b/moe{}", "~/moe{}"])
@pytest.mark.parametrize(
    ("ending", "kind"),
    [(".gguf", "GGUF"), (".GGUF", "GGUF"), ("-00001-of-00002.safetensors", "single file")],
)
@pytest.mark.parametrize("ask", [resolve_model, fetch_metadata])
def test_a_missing_file_is_not_asked_of_the_hub(
    ask: Callable[..., object], ending: str, kind: str, at: str, tmp_path: Path
) -> None:
    """Wherever it is named to be: with one slash it could be a name on the hub."""
    with pytest.raises(ConfigError) as failure:
        ask(at.format(ending), endpoint="http://127.0.0.1:9", cache_dir=tmp_path)
    assert failure.value.message == f"there is no file {at.format(ending)}"
    assert "folder of safetensors or ORG/NAME" in failure.value.hint
    assert failure.value.hint.endswith(f"no {kind}")


@pytest.mark.parametrize("at", ["{0}/my-moe/{1}", "./{1}", "my-moe/{1}", "{1}", "~/my-moe/{1}"])
@pytest.mark.parametrize("ask", [resolve_model, fetch_metadata])
def test_a_file_is_not_a_folder(
    folder: Path, ask: Callable[[str], object], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is named from: with one slash it could be a name on the hub."""
    monkeypatch.setitem(os.environ, "HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent if "my-moe" in at else folder)
    ggufs = dict.fromkeys(("moe.gguf", "moe2.GGUF"), "GGUF is not")
    for name in ggufs:
        (folder / name).touch()
    hints = dict.fromkeys(("config.json", "model.safetensors"), "name the folder it is in: ")
    for name, hint in (hints | ggufs).items():
        with pytest.raises(ConfigError, match="is a file, not a model folder") as failure:
            ask(at.format(folder.parent, name))
        assert hint in failure.value.hint


@pytest.mark.parametrize("name", ["", "two words", "@main"])
def test_what_is_no_name_at_all(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model"):
        resolve_model(name, cache_dir=tmp_path)
