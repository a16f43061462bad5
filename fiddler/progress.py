"""Progress bars on standard error; nothing where that is no terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from fiddler.errors import ConfigError

Progress = Callable[[str, int, int], None]  # what, done, total
Count = Callable[[int, int], None]  # done, total


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress | None]:
    """Yield a callback that draws one bar for each thing it is told of; they vanish at the end.

    Things named like a repository (``ORG/NAME``), and experts, are counted in bytes.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    name, amount = TextColumn("{task.description}"), TextColumn("{task.fields[amount]}")
    columns = name, BarColumn(), amount, TimeRemainingColumn()
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        began: dict[str, tuple[float, int]] = {}

        def show(what: str, done: int, total: int) -> None:
            start_s, start = began.setdefault(what, (time.perf_counter(), done))
            seconds = time.perf_counter() - start_s
            text = amount_text(what, done, total, (done - start) / seconds if seconds > 1 else 0.0)
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, amount=text)
            bars.update(tasks[what], completed=done, total=total, amount=text)

        yield show


@contextlib.contextmanager
def request_bar(use_tqdm: bool, on_progress: Count | None = None) -> Iterator[Count]:
    """Yield what is told of finished requests: a bar, if it is asked for, and ``on_progress``."""
    if not isinstance(use_tqdm, bool):
        raise ConfigError(
            f"use_tqdm must be True or False, not {use_tqdm!r}",
            hint="generate(on_progress=...) tells a display of your own",
        )
    with progress_bars() if use_tqdm else contextlib.nullcontext() as bars:

        def tell(done: int, total: int) -> None:
            if bars is not None:
                bars("requests", done, total)
            if on_progress is not None:
                on_progress(done, total)

        yield tell


def amount_text(what: str, done: int, total: int, rate: float = 0.0) -> str:
    """``3 of 64``, or ``1.2 GB of 61.1 GB, 5.2 GB/s`` of bytes; a ``rate`` of 0 is not known."""
    if "/" not in what and what != "experts":
        return f"{done:,} of {total:,}"
    from rich.filesize import decimal

    speed = f", {decimal(round(rate))}/s" if rate > 0 else ""
    return f"{decimal(done)} of {decimal(total)}{speed}"
