"""The command line as a whole: help, options, streams, exit codes; with a fake model."""

import os
import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from fake_llm import FakeLLM
from terminal import terminal

from fiddler.cli import COMMANDS, cli, session
from fiddler.cli.options import ENGINE_OPTIONS, SAMPLING_OPTIONS
from fiddler.cli.params_edit import SETTABLE
from fiddler.config import EngineConfig
from fiddler.dtype_names import DTYPES
from fiddler.errors import ConfigError, OutOfMemoryError
from fiddler.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]


def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments, input=stdin, prog_name="fiddler")
    return result.exit_code, result.stdout, result.stderr


# --- help and options ---


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


def test_a_command_leaves_without_a_last_look_for_garbage() -> None:
    """Of all that torch brings it takes 0.6 s, for which a prompt of the shell would wait."""
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0));"
        "from fiddler.cli import main; main()"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines()[-1] == "True"


def test_version() -> None:
    from fiddler import __version__

    assert run("--version") == (0, f"fiddler {__version__}\n", "")


def test_an_unknown_command_offers_the_nearest() -> None:
    code, _, err = run("generat", "hi")
    assert code == 2
    assert "generate" in err


def test_the_config_knows_what_the_options_offer() -> None:
    for option in ENGINE_OPTIONS:
        if isinstance(option.type, click.Choice):
            for choice in option.type.choices:
                EngineConfig(**{option.field: choice})


def test_every_shared_option_sets_a_real_field() -> None:
    assert {option.field for option in ENGINE_OPTIONS} <= {
        field.name for field in fields(EngineConfig)
    }
    assert {option.field for option in SAMPLING_OPTIONS} <= set(SETTABLE)
    assert {option.type.name for option in ENGINE_OPTIONS if option.type is not None} >= {"choice"}


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
        (
            torch.AcceleratorError("CUDA error: device lost\nCompile with"),
            1,
            "error: the GPU failed: device lost\nhint: start again",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: the GPU has no memory left"),
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


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_an_error_breaks_between_words_in_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fiddler", "generate", "hi", "-m", "/no/folder"]
    with terminal(command, tmp_path, COLUMNS="50", NO_COLOR="1") as shown:
        assert shown.exit_code() == 1
        found = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown.transcript).splitlines()
    lines = [line for line in found if line.strip()]
    assert len(lines) > 2 and max(map(len, lines)) <= 50
    plain = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert " ".join(lines).split() == plain.split()
