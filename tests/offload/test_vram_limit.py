"""Torch's limit is one for the process: it has to hold every model that is open."""

from contextlib import ExitStack

import pytest
import torch

from fiddler.loading.vram import limit_vram
from offload.layout import MARGIN_FIXED_BYTES
from offload.plan import Budget
from offload.planner import plan
from offload.popularity import Popularity
from tests.offload.planner_cases import GIB, machine, model, without_gpu


def test_models_that_are_open_add_up_and_the_last_lifts_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    hardware = machine()
    layout = plan(
        model(),
        hardware,
        Budget(max_context=4096, vram_bytes=8 * GIB),
        Popularity.uniform(4, 8),
        popularity_name="uniform",
    )
    share = (8 * GIB - hardware.cuda_context_bytes - MARGIN_FIXED_BYTES) / (24 * GIB)
    with ExitStack() as first:
        limit_vram(layout, hardware, first)
        with ExitStack() as second:
            limit_vram(layout, hardware, second)
    assert limits == pytest.approx([share, 2 * share, share, 1.0])


def test_without_a_gpu_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no GPU, no limit")

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", refuse)
    layout = plan(
        model(),
        without_gpu(),
        Budget(max_context=4096),
        Popularity.uniform(4, 8),
        popularity_name="uniform",
    )
    with ExitStack() as resources:
        limit_vram(layout, without_gpu(), resources)
