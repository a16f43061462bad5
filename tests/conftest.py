"""Settings of all tests.

Properties are tried on the same examples at every run, and take what time they take; a longer
search: ``pytest --hypothesis-profile=search``. Without a GPU, Triton kernels run in its
interpreter: the choice must precede its import.
"""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("same")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_interpreter import make_quick

    make_quick()


@pytest.fixture(scope="session", autouse=True)
def measured_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times of a GPU and its CPU are measured once for all tests and never in the user's cache.

    So two loads of a model divide prompts alike and give the same tokens.
    """
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.calibration.cache_file", lambda: folder / "cpu.json")
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, also where the process was started with it ignored (in the background)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def may_go() -> Iterator[threading.Event]:
    """What a worker waits for that is held."""
    event = threading.Event()
    yield event
    event.set()
