"""The command line as a whole: help, options, streams, exit codes; with a fake model."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from fake_llm import FakeLLM

from fiddler.cli import COMMANDS, cli, session
from fiddler.cli.options import ENGINE_OPTIONS, SAMPLING_OPTIONS
from fiddler.cli.params_edit import SETTABLE
from fiddler.config import EngineConfig
from fiddler.dtype_names import DTYPES
from fiddler.errors import ConfigError, OutOfMemoryError
from fiddler.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """Every command gets a fake model; they are listed here as they are opened."""
    opened: list[FakeLLM] = []

    def open_llm(**options: object) -> FakeLLM:
        opened.append(FakeLLM(**options))
        return opened[-1]

    monkeypatch.setattr(session, "open_llm", open_llm)
    return opened


def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments, input=stdin, prog_name="fiddler")
    return result.exit_code, result.stdout, result.stderr


# --- help ---


def test_help_names_every_command() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: fiddler {name}")


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_help_says_the_defaults_that_are_applied(name: str) -> None:
    shown = " ".join(run(name, "--help")[1].split())
    house = SamplingParams().with_defaults({})
    for field in ("temperature", "top_k", "top_p", "repetition_penalty"):
        flag = "--" + field.replace("_", "-")
        said = shown.partition(f" {flag} ")[2].partition(" --")[0]
        value = getattr(house, field)
        assert said.endswith(f"[default: the model's generation_config.json, or {value:g}]")
    longest = "to the end of the context" if name == "chat" else house.max_tokens
    for field, default in (("max-tokens", longest), ("seed", EngineConfig().seed)):
        said = shown.partition(f" --{field} ")[2].partition(" --")[0]
        assert f"[default: {default}]" in said


@pytest.mark.parametrize("text", ["8", "8.", "8e0", "8G", "8GB", "8gib", "8.0 GiB", " 8g "])
@pytest.mark.parametrize("field", ["vram_gb", "ram_gb"])
def test_gib_may_be_written_with_their_unit(field: str, text: str, fake: list[FakeLLM]) -> None:
    code, _, err = run("generate", "Hi", f"--{field.replace('_', '-')}", text)
    assert code == 0, err
    assert fake[0].options[field] == 8.0


@pytest.mark.parametrize("text", ["32768", "32k", "32K", "32 k"])
def test_a_context_may_be_written_in_1024s(text: str, fake: list[FakeLLM]) -> None:
    assert run("generate", "Hi", "--context", text)[0] == 0
    assert fake[0].options["max_model_len"] == 32_768


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--vram-gb", "8TB"), "'8TB' is not a valid number of GiB, as in 8 or 7.5."),
        (("--ram-gb", "GB"), "'GB' is not a valid number of GiB, as in 8 or 7.5."),
        (("--vram-gb", "-1"), "-1.0 is not in the range x>=0."),
        (("--context", "32m"), "'32m' is not a valid number of tokens, as in 32768 or 32k."),
        (("--context", "3.5k"), "'3.5k' is not a valid number of tokens, as in 32768 or 32k."),
        (("--context", "0k"), "0 is not in the range x>=1."),
        (("--max-tokens", "many"), "'many' is not a valid whole number."),
        (("--tbt-target-ms", "soon"), "'soon' is not a valid number."),
    ],
)
def test_what_is_no_size_is_said_in_plain_words(
    arguments: tuple[str, str], said: str, fake: list[FakeLLM]
) -> None:
    code, _, err = run("generate", "Hi", *arguments)
    assert code == 2 and not fake
    assert said in " ".join(err.split())


@pytest.mark.parametrize(
    ("name", "near"),
    [("q4_0", "w4g128"), ("int8", "w8g128"), ("w4g12", "w4g128"), ("bf16", "bfloat16"), ("x", "")],
)
def test_an_unknown_dtype_names_a_few_near_ones_and_where_all_are(
    name: str, near: str, fake: list[FakeLLM]
) -> None:
    code, _, err = run("generate", "Hi", "--dtype", name)
    said = " ".join(err.split())
    assert code == 2 and not fake and f"'{name}' is no type of weights; did you mean" in said
    named = re.findall(r"'([\w-]+)'", said.partition("did you mean")[2].partition("?")[0])
    assert 1 <= len(named) <= 3 and set(named) <= set(DTYPES) and named[0].startswith(near)
    assert "docs/packed-experts.md" in said
    with pytest.raises(ConfigError) as failure:  # what LLM(...) says is the same
        EngineConfig(dtype=name)
    assert failure.value.message in said and failure.value.hint[1:] in said


@pytest.mark.parametrize(
    "command",
    [
        ("chat",),
        ("plan",),
        ("eval",),
        ("profile", "--text", "{folder}/text", "-o", "{folder}/p.json"),
        ("quantize", "-o", "{folder}/made"),
    ],
    ids=lambda command: command[0],
)
def test_a_model_is_named_with_and_without_its_flag(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("some words")
    words = [word.format(folder=tmp_path) for word in command]
    found = {run(*words, *named) for named in (("no-such",), ("-m", "no-such"))}
    assert len(found) == 1
    ((code, out, err),) = found
    assert (code, out) == (1, "") and "there is no model 'no-such'" in err
    code, _, err = run(*words, "no-such", "-m", "builtin")
    assert code == 2 and "give either MODEL or -m MODEL, not both" in err
    if command[0] in ("eval", "profile", "quantize"):
        code, _, err = run(*words)
        assert code == 2 and "Missing argument 'MODEL'" in err


def test_a_chat_without_a_model_is_with_the_builtin_one(fake: list[FakeLLM]) -> None:
    for named in ((), ("other",), ("--model", "other")):
        assert run("chat", *named, stdin="hello\n")[0] == 0
    assert [llm.options["model"] for llm in fake] == ["builtin", "other", "other"]


def test_help_is_quick_and_imports_no_command() -> None:
    """0.2 s of processor time (as under load the clock would lie), and no heavy module."""
    script = (
        "import sys; from fiddler.cli import cli; cli.main(['--help'], standalone_mode=False);"
        "print([m for m in sys.modules if m.split('.')[0] in"
        " {'torch', 'rich', 'numpy', 'prompt_toolkit', 'huggingface_hub', 'numba'}"
        " or m.startswith('fiddler.cli.')])"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert out.splitlines()[-1] == "[]"
    assert min(times) < 0.2


def test_version() -> None:
    from fiddler import __version__

    assert run("--version") == (0, f"fiddler {__version__}\n", "")


def test_an_unknown_command_offers_the_nearest() -> None:
    code, _, err = run("generat", "hi")
    assert code == 2
    assert "generate" in err


# --- generate ---


def test_generate_writes_the_answer_and_nothing_else(fake: list[FakeLLM]) -> None:
    code, out, err = run("generate", "hello there")
    assert (code, out) == (0, "You said: hello there\n")
    assert err.startswith("prompt 2 tok")
    assert fake[0].is_closed
    assert fake[0].asked[0][0] == [{"role": "user", "content": "hello there"}]


def test_quiet_generate_says_nothing_else(fake: list[FakeLLM]) -> None:
    assert run("generate", "-q", "hello") == (0, "You said: hello\n", "")


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["say"], "piped\n", "say\n\npiped"),
        (["-"], "piped\n", "piped"),
        ([], "piped\n", "piped"),
        (["say"], "", "say"),
    ],
)
def test_the_pipe_goes_behind_the_prompt(
    fake: list[FakeLLM], arguments: list[str], stdin: str, prompt: str
) -> None:
    code, _, _ = run("generate", *arguments, stdin=stdin)
    assert code == 0
    assert fake[0].asked[0][0] == [{"role": "user", "content": prompt}]


def test_an_empty_prompt_is_one_sentence(fake: list[FakeLLM]) -> None:
    code, out, err = run("generate", "-", stdin="\n")
    assert (code, out) == (1, "")
    assert err.startswith("error: the prompt is empty\nhint: ")
    assert not fake, "the model was loaded for nothing"


def test_raw_and_models_without_template_continue_the_text(
    fake: list[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("generate", "--raw", "once upon")
    monkeypatch.setattr(FakeLLM, "has_chat_template", False)
    run("generate", "a time")
    assert [llm.asked[0][0] for llm in fake] == ["once upon", "a time"]


def test_system_and_think_reach_the_template(fake: list[FakeLLM]) -> None:
    run("generate", "-s", "be brief", "--think", "off", "hello")
    messages, _, kwargs = fake[0].asked[0]
    assert messages[0] == {"role": "system", "content": "be brief"}
    assert kwargs == {"enable_thinking": False}


def test_system_with_raw_is_misuse(fake: list[FakeLLM]) -> None:
    assert run("generate", "--raw", "-s", "x", "hello")[0] == 2


def test_json_is_one_object(fake: list[FakeLLM]) -> None:
    code, out, _ = run("generate", "--json", "--seed", "5", "--max-tokens", "3", "ponder and go on")
    record = json.loads(out)
    assert code == 0
    assert record["seed"] == 5
    assert record["finish_reason"] == "length"
    assert record["params"]["max_tokens"] == 3
    assert record["stats"]["output_tokens"] == 3
    assert (record["text"], record["reasoning"]) == ("", "hmm ")


def test_options_become_the_fields_they_name(fake: list[FakeLLM]) -> None:
    given = "--temperature 0.5 --top-k 9 --stop a --stop b --ignore-eos --vram-gb 0.5 --context 99"
    code, _, err = run("generate", "-m", "org/name", *given.split(), "--offline", "hello")
    assert code == 0, err
    params = fake[0].asked[0][1]
    assert (params.temperature, params.top_k, params.stop) == (0.5, 9, ("a", "b"))
    assert params.ignore_eos
    assert fake[0].options == {
        "model": "org/name",
        "vram_gb": 0.5,
        "max_model_len": 99,
        "offline": True,
    }


def test_options_not_given_leave_the_defaults(fake: list[FakeLLM]) -> None:
    run("generate", "hello")
    assert fake[0].options == {"model": "builtin"}
    assert fake[0].asked[0][1] == fake[0].default_params()


def test_every_shared_option_sets_a_real_field() -> None:
    assert {option.field for option in ENGINE_OPTIONS} <= {
        field.name for field in fields(EngineConfig)
    }
    assert {option.field for option in SAMPLING_OPTIONS} <= set(SETTABLE)
    assert {option.type.name for option in ENGINE_OPTIONS if option.type is not None} >= {"choice"}


def test_a_bad_parameter_is_one_sentence(fake: list[FakeLLM]) -> None:
    code, _, err = run("generate", "--top-p", "7", "hello")
    assert code == 1
    assert err.startswith("error: top_p must be")


# --- chat on a pipe ---


def test_chat_takes_a_line_as_a_turn(fake: list[FakeLLM]) -> None:
    piped = 'one\n\n/set temperature=0\n"""two\nlines"""\n'
    code, out, err = run("chat", stdin=piped)
    assert (code, out) == (0, "You said: one\nYou said: two\nlines\n")
    assert "\x1b" not in out + err
    assert fake[0].asked[1][1].temperature == 0
    assert fake[0].is_closed


def test_only_a_chats_answers_go_on_to_the_end_of_the_context(fake: list[FakeLLM]) -> None:
    limits = []
    for command, stdin in ((["generate", "hello"], None), (["chat"], "hello\n")):
        for options in ([], ["--max-tokens", "9"]):
            assert run(*command, *options, stdin=stdin)[0] == 0
            limits.append(fake[-1].asked[0][1].max_tokens)
    assert limits == [512, 9, None, 9]
    for command in ("generate", "chat"):
        assert ("[default: 512]" in run(command, "--help")[1]) == (command == "generate")


def test_chat_on_a_pipe_fails_if_a_turn_failed(fake: list[FakeLLM]) -> None:
    code, out, err = run("chat", "-q", stdin="too long\nhello\n")
    assert (code, out) == (1, "You said: hello\n")
    assert err.startswith("error: ")


def test_a_model_without_a_template_cannot_chat_and_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fiddler.llm.LLM", lambda **_: pytest.fail("was loaded"))
    folder = tmp_path / "my models"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    code, out, err = run("chat", "-m", str(folder), stdin="hello\n")
    assert (code, out) == (1, "")
    assert "my models has no chat template" in err
    assert f"fiddler generate -m '{folder}' --raw" in " ".join(err.split())


@pytest.mark.parametrize("command", [("generate", "hello"), ("chat",)])
def test_a_shape_without_a_tokenizer_is_refused_before_weights_are_made(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("fiddler.llm.LLM", lambda **_: pytest.fail("was loaded"))
    code, out, err = run(*command, "-m", "mixtral-8x7b", "--load-format", "dummy", stdin="hello\n")
    assert (code, out) == (1, "")
    assert "mixtral-8x7b has no tokenizer" in err


# --- errors ---


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def open_llm(**options: object) -> None:
        raise error

    monkeypatch.setattr(session, "open_llm", open_llm)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OutOfMemoryError("it does not fit", hint="buy"), 1, "error: it does not fit\nhint: buy\n"),
        (OutOfMemoryError("it does not fit"), 1, "error: it does not fit\n"),
        (ModuleNotFoundError("x", name="torch.cuda"), 1, "'torch' is missing\nhint: pip install"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: permission denied\n"),
        (
            ValueError("FIDDLER_ISA is odd."),
            1,
            "error: FIDDLER_ISA is odd.\nhint: unset FIDDLER_ISA",
        ),
        (RuntimeError("odd\nlines"), 1, "error: unexpected RuntimeError: odd\nhint: "),
        (KeyboardInterrupt(), 130, ""),
        (click.UsageError("no"), 2, "Error: no"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_errors_become_sentences_and_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    fail_with(monkeypatch, error)
    got, out, err = run("generate", "hello")
    assert (got, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert bool(said) == bool(err)


def test_debug_shows_where_it_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, RuntimeError("odd"))
    result = CliRunner().invoke(cli, ["--debug", "generate", "hello"])
    assert isinstance(result.exception, RuntimeError)


def test_the_config_knows_what_the_options_offer() -> None:
    for option in ENGINE_OPTIONS:
        if isinstance(option.type, click.Choice):
            for choice in option.type.choices:
                EngineConfig(**{option.field: choice})
