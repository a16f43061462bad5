"""``fiddler eval``: what it prints, and what it refuses before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cpu_kernels.weight_kind import parse_kind
from fiddler.cli import cli
from fiddler.errors import FiddlerError
from fiddler.evaluate.preparation import builtin_text, reference_options
from fiddler.quantize.run import QuantizeJob, quantize
from tests.tiny_models import make_tiny, shared_tiny

TEXT = "Mira is a baker. She lives in Toll. Who bakes the bread of the town? It is Mira. " * 3
OPTIONS = ["--device", "cpu", "--cpu-threads", "1", "--window", "60"]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, arguments)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("fiddler.cli.eval.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_json_has_all_keys_and_is_the_same_twice(text: Path, cache: Path) -> None:
    arguments = [shared_tiny("mixtral"), "--text", text, *OPTIONS, "--against", "bf16"]
    done = run(*arguments, "-o", "json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    run_keys = {"model", "revision", "dtype", "expert_dtype", "kv_dtype", "scored_tokens"}
    run_keys |= {"nll", "nll_stderr", "perplexity", "perplexity_stderr"}
    kl_keys = {"kl", "kl_stderr", "kl_p99", "kl_max", "same_top", "same_top_stderr"}
    own_keys = {"build_commit", "text", "text_sha256", "text_tokens", "window", "stride"}
    assert set(record) == run_keys | own_keys | {"against", "questions"}
    assert set(record["against"]) == run_keys | kl_keys
    assert record["questions"] is None
    assert (record["window"], record["stride"]) == (60, 30)
    assert record["scored_tokens"] == record["text_tokens"] - 1 == len(TEXT) - 1
    assert (record["dtype"], record["against"]["dtype"]) == ("float32", "bfloat16")
    assert 0 < record["against"]["kl"] < 0.1
    assert run(*arguments, "-o", "json").stdout == done.stdout
    assert not list(cache.iterdir())


def test_a_narrow_terminal_gets_a_record_for_each_run(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiddler.cli.eval.output_width", lambda: 30)
    folder = shared_tiny("mixtral")
    done = run(folder, "--text", text, *OPTIONS, "--max-tokens", 100, "--against", folder)
    assert done.exit_code == 0, done.output
    names = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert (names.count("model"), names.count("perplexity"), names.count("same")) == (2, 2, 1)
    assert "|" not in done.stdout


def test_the_table_has_the_reference_above_the_model(text: Path) -> None:
    folder = shared_tiny("mixtral")
    done = run(folder, "--text", text, *OPTIONS, "--max-tokens", 100, "--against", folder)
    assert done.exit_code == 0, done.output
    head, _, reference, compared, _, below, build = done.stdout.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        *("model", "dtype", "experts", "perplexity", "KL", "KL 99 %", "same top token")
    ]
    assert reference.split("|")[1:5] == compared.split("|")[1:5]
    assert "| 0 ± 0 |" in compared and "100.00% ± 0.00%" in compared
    assert below.startswith(f"text: {text}, 99 tokens scored in windows of 60, 30 apart")
    assert build.startswith("build: ")


def test_questions_are_counted_by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.evaluate.preparation.NUM_QUESTIONS", 2)
    options = [*OPTIONS, "--max-tokens", 60]
    done = run("builtin", *options, "--questions", "-o", "json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["text"] == "held-out conversations"
    one = {"asked": 1, "right": 1}
    assert record["questions"]["by_task"] == {"add": one, "subtract": one}
    assert record["questions"]["accuracy"] == 1
    table = run("builtin", *options, "--questions").stdout
    assert "2 of 2, 100.0% ± 0.0%" in table
    assert "questions: add 1/1, subtract 1/1" in table


def test_the_built_in_text_is_always_the_same() -> None:
    assert builtin_text() == builtin_text()
    assert builtin_text().count("<|im_start|>assistant\n") >= 130


def test_a_reference_in_another_type_or_another_model() -> None:
    options = {"model": "a/b", "dtype": "bfloat16", "vram_gb": 8.0, "revision": "r", "profile": "p"}
    assert reference_options(options, "float32") == options | {"dtype": "float32"}
    assert reference_options(options, "bf16")["dtype"] == "bfloat16"
    assert reference_options(options, "c/d") == {"model": "c/d", "vram_gb": 8.0}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "none.txt"], "the text file none.txt cannot be read: No such file"),
        (["--text", "empty.txt"], "empty.txt is empty"),
        (["--window", "500"], "the text has 243 tokens, less than one window of 500"),
        (["--max-tokens", "9", "--window", "10"], "the text has 9 tokens, less than one window"),
        (["--window", "10", "--stride", "10"], "the stride must be between 1 and 9"),
        (["--window", "512"], "a window has 512 tokens, but the context holds 512"),
        (["--window", "60", "--context", "60"], "a window has 60 tokens, but the context holds 60"),
        (["--questions", "--window", "60"], "a question has "),
        (["--window", "60", "--against", "bf17"], "there is no model 'bf17'"),
        (["--window", "60", "--against", "builtin"], "make different tokens of the text"),
        (["--window", "1"], "1 is not in the range x>=2"),
    ],
)
def test_bad_input_is_one_sentence_before_the_model_loads(
    text: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(text.parent)
    (text.parent / "empty.txt").touch()
    monkeypatch.setattr("fiddler.cli.session.open_llm", lambda **_: pytest.fail("was loaded"))
    given = [] if "--text" in arguments else ["--text", "text.txt"]
    done = run(shared_tiny("mixtral"), *given, *arguments)
    assert done.exit_code in (1, 2)
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("scheme", ["w4g32", "w8g64", "bf12"])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_rounded_experts_have_no_other_type(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: str
) -> None:
    """Those in 12 bits have: they are the bfloat16 ones."""
    source = shared_tiny("qwen3_moe", moe_intermediate_size=64, dtype="bfloat16")
    folder = tmp_path / "packed"
    quantize(QuantizeJob(source=source, output=folder, kind=parse_kind(scheme), method="rtn"))
    monkeypatch.setattr("fiddler.cli.session.open_llm", loads)
    for against in (dtype, source):
        done = run(folder, "--text", text, *OPTIONS, "--against", against)
        if scheme == "bf12" or against == source:
            assert "would be loaded" in done.stderr
        else:
            assert f"stored as {scheme}, so the model would be compared with" in done.stderr
            assert "hint: name the model that it was made from: --against" in done.stderr


def loads(**_: object) -> None:
    raise FiddlerError("a model would be loaded")


def test_unknown_models_and_models_that_do_not_chat(text: Path, tmp_path: Path) -> None:
    assert "there is no model 'buildin'; did you mean builtin?" in run("buildin").stderr
    folder = make_tiny("mixtral", tmp_path / "model", max_position_embeddings=4096)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = run(folder, "--text", text, "--window", 60, "--questions")
    assert "has no chat template, so it answers no questions" in done.stderr
