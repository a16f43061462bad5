"""Slash commands: parsing, the nearest name, completion and help come from one table."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cli.chat_actions import TABLE
from fiddler.cli.chat_commands import (
    completions,
    find_command,
    help_lines,
    is_unfinished,
    parse_command,
    turns,
    unquote,
)
from fiddler.errors import ConfigError

NAMES = [command.name for command in TABLE]


def test_the_table_has_what_a_chat_needs() -> None:
    wanted = "help exit clear regen undo forget system set show save load read stats experts think"
    assert wanted.split() == NAMES


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("/help", ("help", "")),
        ("/help  ", ("help", "")),
        ("/save my file.json", ("save", "my file.json")),
        ('/system """\nline one\nline two\n"""', ("system", "line one\nline two")),
        ("/set stop=a b", ("set", "stop=a b")),
        ("/etc/passwd is a file", None),
        ("/Help", None),
        (" /help", None),
        ("1/2", None),
        ("", None),
    ],
)
def test_commands_and_messages_are_told_apart(text: str, parsed: object) -> None:
    assert parse_command(text) == parsed


@given(name=st.sampled_from(NAMES), argument=st.text(max_size=20))
def test_every_command_is_found_with_any_argument(name: str, argument: str) -> None:
    parsed = parse_command(f"/{name} {argument}")
    assert parsed is not None
    assert find_command(parsed[0], TABLE).name == name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("/quit", "exit"), ("/q", "exit"), ("/bye", "exit"), ("/?", "help"), ("/h", "help")],
)
def test_other_programs_names_are_found(typed: str, meant: str) -> None:
    parsed = parse_command(typed)
    assert parsed is not None
    assert find_command(parsed[0], TABLE).name == meant


def test_no_two_commands_share_a_name() -> None:
    names = [name for command in TABLE for name in (command.name, *command.aliases)]
    assert len(names) == len(set(names))


def test_an_unknown_command_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match="no command /zzz") as caught:
        find_command("zzz", TABLE)
    assert caught.value.hint.startswith("/help lists them")


@pytest.mark.parametrize(
    ("typed", "meant"), [("exi", "exit"), ("sav", "save"), ("qiut", "quit"), ("clera", "clear")]
)
def test_the_nearest_command_is_offered(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"no command /{typed}; did you mean /{meant}"):
        find_command(typed, TABLE)


def test_help_has_a_line_for_each_command() -> None:
    lines = help_lines(TABLE)
    assert [line.split()[0] for line in lines] == [f"/{name}" for name in NAMES]
    assert all(len(line) <= 80 for line in lines)


@given(name=st.sampled_from(NAMES), size=st.integers(1, 8))
def test_a_begun_name_completes_to_names_that_begin_so(name: str, size: int) -> None:
    typed = f"/{name}"[:size]
    offered = completions(typed, TABLE)
    assert (f"/{name}", len(typed)) in offered
    assert all(word.startswith(typed) for word, _ in offered)


def test_arguments_complete_too() -> None:
    assert completions("/set temp", TABLE) == [("temperature=", 4)]
    assert completions("/think o", TABLE) == [("on", 1), ("off", 1)]
    assert completions("hello", TABLE) == []


# --- several lines ---


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ('"""', True),
        ('"""one', True),
        ('"""one"""', False),
        ('""""""', False),
        ('""""', True),
        ('/system """be', True),
        ('say """', False),
        ("plain", False),
    ],
)
def test_triple_quotes_keep_a_message_open(text: str, is_open: bool) -> None:
    assert is_unfinished(text) == is_open


lines = st.text(
    st.characters(exclude_characters='"\n/', exclude_categories=["Cc", "Zl", "Zp", "Cs"])
)


@given(messages=st.lists(st.lists(lines, min_size=1, max_size=3), max_size=4))
def test_piped_turns_come_back_whole(messages: list[list[str]]) -> None:
    texts = ["\n".join(message) for message in messages]
    piped = "".join(f'"""{text}"""\n' if "\n" in text else f"{text}\n" for text in texts)
    assert [unquote(turn) for turn in turns(io.StringIO(piped, newline="\n"))] == [
        text.strip("\n") for text in texts
    ]


def test_an_unclosed_quote_ends_with_the_pipe() -> None:
    assert list(turns(['"""one\n', "two\n"])) == ['"""one\ntwo']
