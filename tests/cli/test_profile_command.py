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
from offload.routing_trace import load_trace
from tests.profiling_fakes import NUM_EXPERTS, NUM_LAYERS, FakeLLM, experts_of

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
    assert " of 3.00 bits, median " in done.stdout
    assert "wrote" in done.stderr and "wrote" not in done.stdout
    assert llm.is_closed


def test_json_tells_the_figures(llm: FakeLLM, corpus: Path, tmp_path: Path) -> None:
    done = run("--text", corpus, "-o", tmp_path / "p.json", "--json")
    record = json.loads(done.stdout)
    assert record["num_tokens"] + record["held_out_tokens"] == len(TEXT)
    assert record["present"]["num_resident"] == 4
    present = record["present"]
    assert present["uniform"] <= present["profile"] <= 1
    assert 0 <= present["low"] <= present["profile"] <= present["high"] <= 1
    assert len(record["entropy_bits"]) == NUM_LAYERS


def test_a_chat_file(llm: FakeLLM, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": TEXT}]}))
    assert run("--from-chat", chat, "-o", tmp_path / "p.json").exit_code == 0
    assert bytes(t for window in llm.windows for t in window).decode() == f"<user>{TEXT}"


def test_a_page_tells_what_the_terminal_tells(llm: FakeLLM, corpus: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    done = run("--text", corpus, "-o", tmp_path / "p.json", "--html", page)
    assert done.exit_code == 0, done.output
    assert f"wrote {page}" in done.stderr
    for word in ("org/fake: use of its experts", "4 of 16", "<svg"):
        assert word in page.read_text()
    assert run("--text", corpus, "-o", tmp_path / "p.json", "--html", page).exit_code == 0


def test_a_trace_holds_every_token_in_its_order(llm: FakeLLM, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    done = run("--text", corpus, "-o", tmp_path / "p.json", "--trace", path)
    assert done.exit_code == 0, done.output
    trace = load_trace(path)
    assert bytes(trace.tokens_T.tolist()).decode() == TEXT
    assert trace.footprint.moe_layers == (0, 2)
    for token, experts_MK in zip(trace.tokens_T.tolist(), trace.experts_TMK.tolist(), strict=True):
        assert experts_MK == [list(experts_of(token, layer)) for layer in (0, 2)]
    assert len(trace.starts_W) == len(llm.windows)


def pair(tmp_path: Path, llm: FakeLLM) -> list[Path]:
    paths = []
    for name, text in (("a", TEXT), ("b", TEXT[::-1] * 2)):
        (tmp_path / f"{name}.txt").write_text(text)
        path = tmp_path / f"{name}.json"
        assert run("--text", tmp_path / f"{name}.txt", "-o", path).exit_code == 0
        paths.append(path)
    return paths


def two(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["profile", *map(str, arguments)])


def test_two_profiles_are_compared(llm: FakeLLM, tmp_path: Path) -> None:
    paths = pair(tmp_path, llm)
    done = two("--compare", *paths)
    assert done.exit_code == 0, done.output
    assert "A: a.json, profile of" in done.stdout and "4 of 16" in done.stdout
    record = json.loads(two("--compare", *paths, "--json").stdout)
    assert [layer["layer"] for layer in record["layers"]] == [0, 2]
    assert all(row["first"] <= row["second"] + 0.05 for row in record["transfers"])


def test_two_profiles_are_merged(llm: FakeLLM, tmp_path: Path) -> None:
    paths, merged = pair(tmp_path, llm), tmp_path / "m.json"
    done = two("--merge", *paths, "-o", merged)
    assert done.exit_code == 0, done.output
    one, other, both = (
        load_profile(path, model="org/fake", num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS)
        for path in (*paths, merged)
    )
    assert both.num_tokens == one.num_tokens + other.num_tokens
    added = one.popularity.counts_LE + other.popularity.counts_LE
    assert (both.popularity.counts_LE == added).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compare", "a.json", "none.json"], "none.json cannot be read: No such file"),
        (["--compare", "a.json", "a.txt"], "a.txt is not a usable profile: it is not JSON"),
        (["--compare", "a.json", "b.json", "--merge", "a.json", "b.json"], "and no --merge"),
        (["builtin", "--compare", "a.json", "b.json"], "takes two profiles and no MODEL"),
        (["--merge", "a.json", "b.json", "--vram-gb", "3"], "and no --vram-gb"),
        (["--compare", "a.json", "b.json", "-o", "c.json"], "and no -o"),
        (["--merge", "a.json", "a.json", "-o", "c.json"], "of the same text"),
        (["--merge", "a.json", "b.json", "-o", "b.json"], "-o b.json is one of the two"),
        (["--merge", "a.json", "b.json", "-o", "no/c.json"], "cannot be written there"),
        (["--text", "a.txt"], "Missing argument 'MODEL'"),
    ],
)
def test_contradictions_are_one_sentence(
    llm: FakeLLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    pair(tmp_path, llm)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = two(*arguments)
    assert done.exit_code in (1, 2)
    assert sentence in " ".join(done.stderr.split())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "none.txt"], "the text file none.txt cannot be read: No such file"),
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
        (["--trace", "notes.svg"], "--trace notes.svg exists and is not a routing trace"),
        (["--html", "notes.svg"], "--html notes.svg exists and is not a page of fiddler"),
        (["--html", "no/page.html"], "--html no/page.html cannot be written there"),
        (["--trace", "t.npz", "--html", "t.npz"], "t.npz is where the page of fiddler goes"),
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


def test_a_profile_that_is_there_is_replaced_by_its_name_alone(
    llm: FakeLLM, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--text", corpus).exit_code == 0
    first = Path("profile.json").read_bytes()
    for again in (run("--text", corpus), two("--merge", *pair(tmp_path, llm))):
        assert again.exit_code == 1
        assert "a profile in profile.json already" in " ".join(again.stderr.split())
        assert Path("profile.json").read_bytes() == first
    Path("other.txt").write_text(TEXT + "more of it")
    assert run("--text", "other.txt", "-o", "profile.json").exit_code == 0
    assert Path("profile.json").read_bytes() != first


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
