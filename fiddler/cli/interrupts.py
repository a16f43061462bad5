"""Ctrl-C while the model works: stop between two tokens, never in the middle of a step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets.

    A second one says that a third one ends the program: an interrupt inside a step would leave
    half-written KV pages, so it is not used to stop an answer.
    """
    stop = threading.Event()
    presses = 0

    def interrupted(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        stop.set()
        if presses == 2:
            sys.stderr.write("\nstopping after this step; Ctrl-C again ends fiddler\n")
            sys.stderr.flush()
        elif presses > 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def silent_keyboard() -> Iterator[None]:
    """Do not echo what is typed meanwhile; it waits for the next prompt."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
