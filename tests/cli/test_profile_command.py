"""``fiddler profile`` with a model whose routing is known."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fiddler.cli import cli
from offload.popularity import load_profile
from tests.profiling_fakes import NUM_EXPERTS, NUM_LAYERS, FakeLLM

TEXT = "Some text that is long enough to be cut into windows, again and again. " * 10


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr("fiddler.cli.session.open_llm", lambda **options: fake)
    return fake


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["profile", "org/fake", *map(str, arguments)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(TEXT)
    return tmp_path / "corpus.txt"


def test_a_text_becomes_a_profile_a_picture_and_hit_rates(
    llm: FakeLLM, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    done = run("--text", corpus, "-o", tmp_path / "p.json", "--picture", tmp_path / "p.svg")
    assert done.exit_code == 0, done.output
    profile = load_profile(
        tmp_path / "p.json", model="org/fake", num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS
    )
    assert 0.7 * len(TEXT) < profile.num_tokens < 0.9 * len(TEXT)
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    assert "layer 0 |" in done.stdout and "layer 2 |" in done.stdout
    assert "4 of 16, this VRAM budget" in done.stdout
    assert "wrote" in done.stderr and "wrote" not in done.stdout
    assert llm.is_closed


def test_json_tells_the_figures(llm: FakeLLM, corpus: Path, tmp_path: Path) -> None:
    done = run("--text", corpus, "-o", tmp_path / "p.json", "--json")
    record = json.loads(done.stdout)
    assert record["num_tokens"] + record["held_out_tokens"] == len(TEXT)
    assert record["present"]["num_resident"] == 4
    assert record["present"]["uniform"] <= record["present"]["profile"] <= 1
    assert len(record["entropy_bits"]) == NUM_LAYERS


def test_a_chat_file(llm: FakeLLM, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": TEXT}]}))
    assert run("--chat", chat, "-o", tmp_path / "p.json").exit_code == 0
    assert bytes(t for window in llm.windows for t in window).decode() == f"<user>{TEXT}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "none.txt"], "the corpus none.txt cannot be read: No such file"),
        (["--text", "{corpus}", "-o", "no/p.json"], "no/p.json cannot be written there"),
        (["--text", "{corpus}", "--picture", "p.gif"], "ends in .png or .svg"),
        (["--text", "{corpus}", "--held-out", "0.9"], "between 0.05 and 0.5"),
        (["--chat", "{corpus}"], "line 1 of"),
        ([], "either --text FILE or --chat FILE"),
        (["--text", "{corpus}", "--chat", "{corpus}"], "either --text FILE or --chat FILE"),
    ],
)
def test_bad_input_is_one_sentence_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(corpus.parent)
    monkeypatch.setattr("fiddler.cli.session.open_llm", lambda **_: pytest.fail("was loaded"))
    done = run(*[argument.format(corpus=corpus) for argument in arguments])
    assert done.exit_code in (1, 2)
    assert sentence in done.stderr
    assert not (corpus.parent / "profile.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-o", "corpus.txt"], "-o corpus.txt is the corpus: it would be overwritten"),
        (["-o", "link.txt"], "-o link.txt is the corpus"),
        (["-o", "other.json"], "-o other.json exists and is not a profile"),
        (["--picture", "linked.svg"], "--picture linked.svg is the corpus"),
        (["--picture", "notes.svg"], "--picture notes.svg exists and is not a .svg picture"),
        (["-o", "new.svg", "--picture", "./new.svg"], "new.svg is where the profile goes"),
    ],
)
def test_nothing_of_the_users_is_overwritten(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(corpus.parent)
    monkeypatch.setattr("fiddler.heatmap.check_picture", lambda path: None)
    monkeypatch.setattr("fiddler.cli.session.open_llm", lambda **_: pytest.fail("was loaded"))
    for link in ("link.txt", "linked.svg"):
        Path(link).symlink_to(corpus)
    Path("other.json").write_text('{"messages": []}')
    Path("notes.svg").write_text("my notes")
    before = {path: path.read_bytes() for path in corpus.parent.iterdir()}
    done = run("--text", "corpus.txt", *arguments)
    assert done.exit_code == 1
    assert sentence in " ".join(done.stderr.split())
    assert {path: path.read_bytes() for path in corpus.parent.iterdir()} == before


def test_an_earlier_profile_and_its_picture_are_replaced(
    llm: FakeLLM, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "p.json").touch()  # as mktemp does
    for suffix in (".svg", ".svg", ".png", ".png"):
        done = run(
            *("--text", corpus, "-o", tmp_path / "p.json"),
            *("--picture", tmp_path / f"p{suffix}"),
        )
        assert done.exit_code == 0, done.output


def test_the_model_is_closed_when_the_corpus_is_too_short(llm: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("hello")
    done = run("--text", tmp_path / "short", "-o", tmp_path / "p.json")
    assert "too few to profile with" in done.stderr
    assert llm.is_closed
    assert not (tmp_path / "p.json").exists()


def test_the_script_is_the_same_command() -> None:
    script = Path(__file__).parents[2] / "scripts" / "profile_experts.py"
    environment = {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for option in ("--text", "--chat", "--picture", "--held-out", "--vram-gb"):
        assert option in done.stdout
