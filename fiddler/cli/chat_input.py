"""Where the user's turns come from: a line editor on a terminal, lines on a pipe."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddler.cli.chat_commands import SlashCommand, completions, is_unfinished, turns, unquote
from fiddler.cli.console import note, valid_unicode

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, CONTINUED = ">>> ", "... "
LEAVE_HINT = "Ctrl-D or /exit leaves the chat"

Table = tuple[SlashCommand[Any], ...]


def is_interactive() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def piped_turns() -> Iterator[str]:
    """Turns from standard input; a person who types into it sees a prompt on standard error."""
    if sys.stdin is None:  # closed by whoever started us
        return iter(())
    if sys.stdin.isatty() and sys.stderr.isatty():
        return _unquoted(turns(iter(_prompted_line, "")))
    return _unquoted(turns(sys.stdin))


def _prompted_line() -> str:
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return sys.stdin.readline()


def _unquoted(texts: Iterable[str]) -> Iterator[str]:
    return (valid_unicode(unquote(text)) for text in texts)


def typed_turns(table: Table, *, keep_history: bool) -> Iterator[str]:
    """Turns from the line editor, until Ctrl-D. Ctrl-C clears what was typed."""
    session = _session(table, _history() if keep_history else None)
    while True:
        try:
            yield valid_unicode(unquote(session.prompt()))
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                note(LEAVE_HINT)
        except EOFError:
            return


def _session(table: Table, history: "History | None") -> "PromptSession[str]":
    from prompt_toolkit import PromptSession

    return PromptSession(
        PROMPT,
        prompt_continuation=CONTINUED,
        multiline=True,
        key_bindings=_keys(),
        completer=_completer(table),
        complete_while_typing=False,
        history=history,
        enable_open_in_editor=True,  # Ctrl-X Ctrl-E
        tempfile_suffix=".md",
    )


def _keys() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if is_unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")  # Alt-Enter
    def _(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(table: Table) -> "Completer":
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class SlashCompleter(Completer):
        """Command names and their arguments, from the table."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            name, space, argument = text.partition(" ")
            if space and any(c.takes_path and f"/{c.name}" == name for c in table):
                yield from paths.get_completions(Document(argument), event)
            for word, length in completions(text, table):
                yield Completion(word, start_position=-length)

    return SlashCompleter()


# --- history ---


def _history() -> "History | None":
    """The history file, readable by its owner only; None if there can be none."""
    from prompt_toolkit.history import FileHistory

    try:
        return FileHistory(str(private_file(history_path())))
    except OSError as error:
        note(f"no history is kept: {error.filename}: {(error.strerror or '').lower()}")
        return None


def history_path() -> Path:
    """Where the lines typed into chats are kept."""
    from platformdirs import user_state_dir

    return Path(user_state_dir("fiddler", appauthor=False)) / "chat_history"


def private_file(path: Path) -> Path:
    """Make sure ``path`` exists with mode 0600, in a folder with mode 0700 if that is new."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.chmod(0o600)
    return path
