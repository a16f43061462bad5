"""A command in a real pseudo-terminal, as a person would use it."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")

HERE = Path(__file__).parent
FAKE_FIDDLER = [sys.executable, str(HERE / "fiddler_with_fake_llm.py")]
PROMPT = ">>>"  # the space behind it is a movement of the cursor
CTRL_C, CTRL_D, CTRL_X, CTRL_E, ALT_ENTER, TAB = "\x03", "\x04", "\x18", "\x05", "\x1b\r", "\t"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Terminal:
    """One running command. ``transcript`` is all that it wrote, escape sequences included."""

    def __init__(self, process: "pexpect.spawn[str]") -> None:
        self.process = process
        self.transcript = ""
        self._raw = ""  # the end of the transcript: perhaps half an escape sequence
        self._unread = ""  # plain text that nobody expected yet

    def type(self, text: str) -> None:
        """Press the keys of ``text``."""
        self.process.send(text)

    def enter(self, text: str) -> None:
        """Type a line and press Enter."""
        self.process.send(text + "\r")

    def paste(self, text: str) -> None:
        """What a terminal sends for a paste, if the program asked for bracketed paste."""
        assert "\x1b[?2004h" in self.transcript
        self.process.send(f"\x1b[200~{text}\x1b[201~")

    def expect(self, text: str, timeout_s: float = 60) -> str:
        """Wait until ``text`` appears, whatever the colours; return the plain text before it."""
        assert self.shows(text, timeout_s), f"no {text!r} in {self._unread!r}"
        before, _, self._unread = self._unread.partition(text)
        return before

    def shows(self, text: str, within_s: float) -> bool:
        """Whether ``text`` appears so soon, or is there already."""
        deadline_s = time.monotonic() + within_s
        while text not in self._unread and (rest_s := deadline_s - time.monotonic()) > 0:
            self._read(rest_s)
        return text in self._unread

    def exit_code(self) -> int:
        """Wait for the end."""
        with suppress(pexpect.EOF):
            while True:
                self._read(20)
        self.process.close()
        code = self.process.exitstatus
        assert code is not None, f"ended by {signal.Signals(self.process.signalstatus).name}"
        return code

    def _read(self, timeout_s: float) -> None:
        with suppress(pexpect.TIMEOUT):
            text = self.process.read_nonblocking(4096, timeout=timeout_s)
            self.transcript += text
            whole, self._raw = _split_unfinished(self._raw + text)
            self._unread += ESCAPES.sub("", whole)


def _split_unfinished(text: str) -> tuple[str, str]:
    """``text`` and the escape sequence that it ends in the middle of, if it does."""
    match = re.search(r"\x1b(\[[0-9;?]*)?$", text)
    return (text[: match.start()], match[0]) if match else (text, "")


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
