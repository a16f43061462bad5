"""Machines for the tests of ``fiddler doctor`` that are in order, and what changes them."""

from dataclasses import replace
from pathlib import Path

import pytest

from cpu_kernels.thread_count import cache_file
from fiddler.cli.doctor_facts import PACKAGES, Facts
from fiddler.cli.doctor_gpu import Gpu
from offload.link_probe import Link

GIB = 1 << 30
GOOD_LINK = Link(generation=4, width=16, max_generation=4, max_width=16, copy_gbps=26.5)
NARROW = replace(GOOD_LINK, generation=3, width=8, copy_gbps=6.5)
CPU_ONLY = Facts(
    fiddler="0.1",
    python="3.11",
    system="Linux",
    packages=dict.fromkeys(PACKAGES, "1.0"),
    physical_cores=8,
    has_avx2=True,
    cache="/cache",
    cache_free_bytes=500 * GIB,
    cache_is_writable=True,
)
WITH_GPU = replace(
    CPU_ONLY,
    packages=CPU_ONLY.packages | {"triton": "3.7.1"},
    triton_wanted="3.7.1",
    torch_cuda="13.0",
    driver="580.65",
    driver_cuda="13.0",
    gpu=Gpu(
        name="RTX 4090",
        count=1,
        capability="8.9",
        vram_total_bytes=24 * GIB,
        vram_free_bytes=22 * GIB + GIB // 2,
    ),
    link=GOOD_LINK,
)


def without(facts: Facts, package: str) -> Facts:
    """The same where ``package`` is not installed."""
    return replace(facts, packages=facts.packages | {package: None})


def keep_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine measured is in ``folder``, and nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr("offload.calibration.cache_file", cache_file)
