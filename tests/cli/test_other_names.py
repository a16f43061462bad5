"""Options and commands of other programs: what they are called here is said."""

import re

import pytest
from click.testing import CliRunner
from fake_llm import FakeLLM

from fiddler.cli import COMMANDS, cli, other_names


def said(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, prog_name="fiddler")
    assert result.exit_code == 2
    return " ".join(result.stderr.split())


def flags(command: str) -> set[str]:
    found = cli.get_command(None, command)  # type: ignore[arg-type]
    assert found is not None
    return {flag for option in found.params for flag in option.opts}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("-ngl", "99"), "No such option '-ngl': --vram-gb"),
        (("-n", "5"), "No such option '-n': --max-tokens"),
        (("-c", "4096"), "'-c': --context"),
        (("--ctx-size=4096",), "'--ctx-size': --context"),
        (("--max-model-len", "4096"), "'--max-model-len': --context"),
        (("--kv-cache-dtype", "fp8"), "'--kv-cache-dtype': --kv-dtype"),
        (("-tp", "2"), "one GPU"),
    ],
)
def test_an_option_of_another_program(
    typed: tuple[str, ...], meant: str, fake: list[FakeLLM]
) -> None:
    for command in ("chat", "generate"):
        assert meant in said(command, *typed)
    assert not fake


LLAMA_BENCH = [
    *("-ngl", "-ncmoe", "-ctk", "-ctv", "-fa", "-mmp", "-ub", "-b", "-sm", "-mg", "-ts", "-nkvo"),
    *("-embd", "-nopo", "-t", "-ot", "-dio", "-dev", "-nr", "-rpc", "-oe", "-hf", "-hff", "-lm"),
]


@pytest.mark.parametrize("command", ["bench", "plan", "chat", "eval"])
@pytest.mark.parametrize("typed", LLAMA_BENCH)
def test_llama_benchs_words_are_not_taken_apart(
    command: str, typed: str, fake: list[FakeLLM]
) -> None:
    """click makes "-n gl" of -ngl, a model "mp" of -mmp, and a word of -fa where there is no -f."""
    for words in ((typed, "1"), (f"{typed}=1",), (typed,)):
        text = said(command, "-m", "builtin", *words)
        assert f"Usage: fiddler {command} " in text
        assert f"No such option {typed!r}" in text
    assert not fake


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("-ngl", "--vram-gb"),
        ("-ncmoe", "--vram-gb"),
        ("-ctk", "--kv-dtype"),
        ("-ctv", "--kv-dtype"),
        ("-t", "--cpu-threads"),
        ("-dev", "--device"),
        ("-hf", "-m ORG/NAME"),
        ("-ub", "how many tokens a step has"),
        ("--batch-size", "how many tokens a step has"),
    ],
)
def test_bench_says_what_does_it_here(typed: str, meant: str) -> None:
    assert f"No such option {typed!r}: {meant}" in said("bench", typed, "8")


def test_a_value_and_a_short_options_own_value_are_left_alone() -> None:
    assert "'-mg' is not a list of numbers" in said("bench", "-p", "-mg")
    assert "'no such' is not one of" in said("bench", "-r5", "-pg", "4,2", "-ono such")
    assert "'x' is not a list of numbers" in said("bench", "-px", "--", "-ngl")


def test_a_long_option_is_named_as_it_was_typed(fake: list[FakeLLM]) -> None:
    text = said("chat", "--top-k", "5", "--top", "3")
    assert "No such option '--top'" in text and "--top-k" in text.partition("'--top'")[2]


def test_a_command_hears_of_its_own_options_only() -> None:
    assert said("doctor", "--ctx-size", "5").endswith("No such option '--ctx-size'.")


@pytest.mark.parametrize("name", other_names.COMMANDS)
def test_a_command_of_another_program(name: str) -> None:
    assert said(name, "x").endswith(f"{name!r}: {other_names.COMMANDS[name]}.")


def test_what_is_said_is_there() -> None:
    everywhere = {name: flags(name) for name in COMMANDS}
    for name, sentence in other_names.OPTIONS.items():
        named = set(re.findall(r"--[a-z-]+", sentence))
        assert any(named <= own for own in everywhere.values()), sentence
        flag = f"--{name.replace('_', '-')}"
        assert not any(flag in own for own in (everywhere["chat"], everywhere["generate"])), flag
    for sentence in other_names.COMMANDS.values():
        assert set(re.findall(r"fiddler ([a-z]+)", sentence)) <= set(COMMANDS)
    assert not set(other_names.COMMANDS) & set(COMMANDS)
