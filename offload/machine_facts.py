"""What a measurement depends on: the machine's parts, and the versions of what runs on them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cpu_kernels.compiled import source_hash
from cpu_kernels.isa import VARIABLE as FORCED_ISA
from cpu_kernels.thread_count import fingerprint_of
from cpu_kernels.topology import read_machine
from offload.hardware import Hardware
from offload.units import GIB

PACKAGES = ("torch", "numba", "triton")


@dataclass(frozen=True, slots=True)
class Machine:
    """What every measurement depends on, as JSON types: what it is, and what runs on it."""

    hardware: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The machine as a person calls it."""
        return name_of(self.hardware)


def this_machine(hardware: Hardware, fiddler_version: str) -> Machine:
    """What every measurement depends on: CPU, RAM, GPU, driver; kernels' sources and packages.

    A CPU that ``FIDDLER_ISA`` takes instructions from is a machine of its own.
    """
    cpu = fingerprint_of(read_machine())
    del cpu["sources"]
    forced = {FORCED_ISA: cpu.pop(FORCED_ISA)} if FORCED_ISA in cpu else {}
    versions = {"fiddler": fiddler_version, "cpu_kernels": source_hash()}
    facts = {
        "cpu_name": hardware.cpu_name,
        **{f"cpu_{name}": fact for name, fact in cpu.items()},
        "physical_cores": hardware.physical_cores,
        "ram_gib": round(hardware.ram_total_bytes / GIB),
        "gpu_name": hardware.gpu_name,
        "vram_gib": round(hardware.vram_total_bytes / GIB),
        "driver": hardware.driver,
        **forced,
    }
    return Machine(plain(facts), versions | {name: _version(name) for name in PACKAGES})


def settings_of(hardware: Hardware) -> dict[str, Any]:
    """What the environment asks for that a machine's rates depend on; nothing unless it does.

    How a GPU hands work to the workers is the part of a decode step that rates call a hand-over.
    """
    if not hardware.has_gpu:
        return {}
    from offload.handoff_probe import VARIABLE, forced_way  # brings torch in, as the GPU has

    way = forced_way()
    return {VARIABLE: way} if way else {}


def name_of(hardware: Mapping[str, Any]) -> str:
    """A section's machine as a person calls it."""
    names = [str(hardware.get("cpu_name") or "some CPU"), str(hardware.get("gpu_name") or "no GPU")]
    return " with ".join(names)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which facts differ: ``torch 2.11 then, 2.12 now``; nothing if none does."""
    names = sorted({*before, *now})
    return ", ".join(
        f"{name} {before.get(name) or 'none'} then, {now.get(name) or 'none'} now"
        for name in names
        if before.get(name) != now.get(name)
    )


def forced_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The :func:`changes` of a machine where ``FIDDLER_ISA`` alone differs; else nothing."""
    bare = [{k: v for k, v in facts.items() if k != FORCED_ISA} for facts in (before, now)]
    return changes(before, now) if bare[0] == bare[1] else ""


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As a file gives it back."""
    found: dict[str, Any] = json.loads(json.dumps({k: _unwrapped(v) for k, v in facts.items()}))
    return found


def _unwrapped(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
