"""What is said when CPU workers fail; the engine replaces them before the next step."""

from collections.abc import Iterator
from contextlib import contextmanager

from cpu_kernels.watchdog import StandstillError
from fiddler.errors import WorkerError


@contextmanager
def workers_errors() -> Iterator[None]:
    """What the pool raises within, as a WorkerError."""
    try:
        yield
    except StandstillError as error:
        raise worker_error(str(error)) from error
    except Exception as error:
        raise worker_error(f"a CPU worker failed ({error})") from error


def worker_error(complaint: str) -> WorkerError:
    """For a step that was under way."""
    return WorkerError(
        f"{complaint} in the middle of a step; its requests were ended",
        hint="run them again: the next step has new workers",
    )
