"""Readers run when they are given out, or not at all."""

import threading

import pytest
import torch

from offload.reader_threads import reader_threads


def test_all_of_them_run_and_torch_keeps_its_number() -> None:
    before, running = torch.get_num_threads(), threading.active_count()
    with reader_threads(5) as readers:
        assert threading.active_count() == running + 5
        assert set(readers.map(lambda _: torch.get_num_threads(), range(20))) == {1}
    assert torch.get_num_threads() == before and threading.active_count() == running


def test_a_thread_that_cannot_be_started_leaves_none_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, running = torch.get_num_threads(), threading.active_count()
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        if threading.active_count() > running + 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        reader_threads(4)
    assert threading.active_count() == running and torch.get_num_threads() == before
