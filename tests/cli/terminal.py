"""A command in a real pseudo-terminal, as a person would use it."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect

HERE = Path(__file__).parent
FAKE_FIDDLER = [sys.executable, str(HERE / "fiddler_with_fake_llm.py")]
PROMPT = ">>> "
CTRL_C, CTRL_D, CTRL_X, CTRL_E, ALT_ENTER, TAB = "\x03", "\x04", "\x18", "\x05", "\x1b\r", "\t"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Terminal:
    """One running command; :meth:`expect` returns the plain text up to what was expected."""

    def __init__(self, process: "pexpect.spawn[str]") -> None:
        self.process = process

    def type(self, text: str) -> None:
        """Press the keys of ``text``."""
        self.process.send(text)

    def enter(self, text: str) -> None:
        """Type a line and press Enter."""
        self.process.send(text + "\r")

    def expect(self, text: str, timeout_s: float = 30) -> str:
        """Wait until ``text`` appears; return what came before it, without escape sequences."""
        self.process.expect_exact(text, timeout=timeout_s)
        return ESCAPES.sub("", self.process.before or "")

    def paste(self, text: str) -> None:
        """What a terminal sends for a paste, if the program asked for bracketed paste."""
        self.process.send(f"\x1b[200~{text}\x1b[201~")

    def exit_code(self) -> int:
        """Wait for the end."""
        self.process.expect(pexpect.EOF, timeout=30)
        self.process.close()
        code = self.process.exitstatus
        assert code is not None, f"ended by {signal.Signals(self.process.signalstatus).name}"
        return code


@contextmanager
def terminal(command: list[str], state: Path, **environment: str) -> Iterator[Terminal]:
    """Run ``command`` in a terminal of 100 x 30; its state folder is ``state``."""
    settings = {
        "TERM": "xterm-256color",
        "XDG_STATE_HOME": str(state),
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers the question where the cursor is
        "PYTHONPATH": str(HERE.parents[1]),
        **environment,
    }
    process = pexpect.spawn(
        command[0],
        command[1:],
        env={**os.environ, **settings},
        encoding="utf-8",
        dimensions=(30, 100),
        timeout=30,
    )
    try:
        yield Terminal(process)
    finally:
        process.close(force=True)
