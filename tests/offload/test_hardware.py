"""The hardware probe on made-up machines; the real one only where there is a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddler.errors import ConfigError
from offload import gpu_probe, hardware
from offload.hardware import Hardware, probe
from offload.nvml import Device

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\nOdd:\n"
CPUINFO = "\n\n".join(
    f"processor : {i}\nmodel name : Test CPU @ 3 GHz\nphysical id : {i // 4}\ncore id : {i % 2}"
    for i in range(8)
)


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up 16 GiB machine, 8 GiB of it available, without psutil, GPU and cgroups."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(hardware, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "CGROUP_ROOT", tmp_path / "fs")
    monkeypatch.setattr(hardware, "probe_gpu", lambda: None)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setitem(sys.modules, "psutil", None)
    return tmp_path


def write_cgroup(folder: Path, names: tuple[str, str, str], limit: str, used: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, cache_name = names
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{used + GIB}\n")  # 1 GiB of it can be reclaimed
    (folder / "memory.stat").write_text(f"anon 5\n{cache_name} {GIB}\n")


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def test_without_psutil_the_kernels_tables_are_read(linux: Path) -> None:
    found = probe("auto")
    assert (found.ram_total_bytes, found.ram_available_bytes) == (16 * GIB, 8 * GIB)
    assert found.cpu_name == "Test CPU @ 3 GHz"
    assert found.physical_cores == 4
    assert not found.has_gpu and found.vram_total_bytes == found.cuda_context_bytes == 0


def test_psutil_and_the_kernels_tables_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    with_psutil = probe("cpu")
    monkeypatch.setitem(sys.modules, "psutil", None)
    without = probe("cpu")
    assert without.ram_total_bytes == with_psutil.ram_total_bytes
    assert without.ram_available_bytes == pytest.approx(with_psutil.ram_available_bytes, rel=0.1)
    assert without.physical_cores == with_psutil.physical_cores


def test_cores_that_the_process_may_not_use_do_not_count(
    linux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {3})
    assert probe("cpu").physical_cores == 1


def test_the_narrowest_cgroup_above_the_process_holds(linux: Path) -> None:
    (linux / "cgroup").write_text("0::/outer/inner\n")
    write_cgroup(linux / "fs/outer/inner", VERSION_2, "max", GIB)
    write_cgroup(linux / "fs/outer", VERSION_2, str(6 * GIB), 2 * GIB)
    found = probe("cpu")
    assert (found.ram_total_bytes, found.ram_available_bytes) == (6 * GIB, 4 * GIB)


def test_a_version_1_cgroup_holds_too(linux: Path) -> None:
    (linux / "cgroup").write_text("5:cpu:/x\n4:memory:/box\n0::/\n")
    write_cgroup(linux / "fs/memory/box", VERSION_1, str(5 * GIB), 4 * GIB)
    write_cgroup(linux / "fs/memory", VERSION_1, str(2**63 - 4096), 9 * GIB)
    found = probe("cpu")
    assert (found.ram_total_bytes, found.ram_available_bytes) == (5 * GIB, GIB)


def test_a_cgroup_that_is_over_its_limit_leaves_nothing(linux: Path) -> None:
    (linux / "cgroup").write_text("0::/\n")
    write_cgroup(linux / "fs", VERSION_2, str(GIB), 3 * GIB)
    assert probe("cpu").ram_available_bytes == 0


def test_cuda_where_there_is_none_is_one_sentence(linux: Path) -> None:
    with pytest.raises(ConfigError, match="sees no CUDA device") as caught:
        probe("cuda")
    assert "--device cpu" in caught.value.hint


class StubDevice(Device):
    """NVML's answers, given."""

    def __init__(self, *, used: int, mine: int | None) -> None:
        object.__setattr__(self, "library", (used, mine))

    def used_bytes(self) -> int:
        return self.library[0]  # type: ignore[no-any-return]

    def process_bytes(self, pid: int) -> int | None:
        return self.library[1]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("device", "used_before", "expected"),
    [
        (StubDevice(used=900, mine=600), 100, 500),  # the process's own figure less torch's pool
        (StubDevice(used=900, mine=None), 400, 500),  # hidden: growth while the context was made
        (StubDevice(used=900, mine=None), None, 800),  # made earlier: all that is used
        (StubDevice(used=900, mine=50), 400, 500),  # less than the pool alone: not to be trusted
        (None, None, 800),  # no NVML
    ],
)
def test_the_context_is_measured_by_the_best_means(
    device: Device | None, used_before: int | None, expected: int
) -> None:
    assert gpu_probe.context_bytes(device, used_before, 100, 900) == expected


def test_who_looks_again_finds_the_same_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where NVML hides the process's own figure, and another program's memory is not ours."""
    has_context, used, reserved, total = False, 400, 0, 2000

    def memory(index: int) -> tuple[int, int]:
        nonlocal has_context, used
        used += 0 if has_context else 250  # it is made here
        has_context = True
        return total - used, total

    class Hidden(StubDevice):
        def used_bytes(self) -> int:
            return used

        def driver_version(self) -> str:
            return "580"

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: has_context,
        "current_device": lambda: 0,
        "mem_get_info": memory,
        "memory_reserved": lambda index: reserved,
        "get_device_name": lambda index: "GPU",
        "get_device_capability": lambda index: (9, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(gpu_probe.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(gpu_probe, "device_uuid", lambda driver, index: "GPU-here")
    monkeypatch.setattr(gpu_probe.nvml, "open_device", lambda uuid: Hidden(used=0, mine=None))
    monkeypatch.setattr(gpu_probe, "_used_before", {})
    found = [gpu_probe.probe_gpu(), gpu_probe.probe_gpu()]
    used, reserved = used + 300, 300  # a model's
    found.append(gpu_probe.probe_gpu())
    assert [gpu.context_bytes for gpu in found if gpu is not None] == [250] * 3


def test_planning_imports_no_torch() -> None:
    modules = "offload.hardware, offload.planner, offload.popularity, fiddler.models.footprint"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_real_gpu_makes_sense() -> None:
    found: Hardware = probe("cuda")
    assert found.has_gpu and found.gpu_name
    assert 50 << 20 < found.cuda_context_bytes < found.vram_total_bytes
    both = found.vram_free_bytes + found.cuda_context_bytes
    assert found.vram_free_bytes < both <= found.vram_total_bytes
