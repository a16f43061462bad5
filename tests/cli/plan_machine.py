"""``fiddler plan`` on a made-up machine."""

import pytest
from click.testing import CliRunner, Result

from fiddler.cli import cli
from offload.hardware import Hardware

GIB = 1 << 30
WITH_GPU = Hardware(
    has_gpu=True,
    gpu_name="Test GPU",
    vram_total_bytes=24 * GIB,
    vram_free_bytes=23 * GIB,
    cuda_context_bytes=GIB // 2,
    ram_total_bytes=128 * GIB,
    ram_available_bytes=120 * GIB,
    physical_cores=8,
    cpu_name="Test CPU",
)


def set_machine(monkeypatch: pytest.MonkeyPatch, machine: Hardware) -> None:
    for module in ("offload.hardware", "fiddler.speed"):
        monkeypatch.setattr(f"{module}.probe", lambda device: machine)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])
