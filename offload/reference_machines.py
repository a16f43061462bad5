"""Machines that a plan may be made for without being on them: shipped ones, and written files.

A file is JSON, ``{"format": 1, "name", "origin", "hardware", "rates"}``: where the figures come
from, and the fields of :class:`offload.hardware.Hardware` and of
:class:`offload.machine_rates.MachineRates`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiddler.errors import ConfigError, nearest
from offload.hardware import Hardware
from offload.machine_rates import MachineRates, from_json, to_json

FORMAT = 1
FOLDER = Path(__file__).parent / "machines"
DEFAULT = "rtx4090-ddr5"
NEEDED = (
    *(("bf16", "f32"), ("bf16", "bf16")),
    *(("int8", "f32"), ("int4", "f32"), ("int8", "int8"), ("int4", "int8")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceMachine:
    """``origin`` says in a few words where the figures come from."""

    name: str
    origin: str
    hardware: Hardware
    rates: MachineRates


def reference_names() -> list[str]:
    """The machines that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_machine(name_or_path: str) -> ReferenceMachine:
    """A shipped machine by its name, or the one in a file; ConfigError for what is neither."""
    if name_or_path in reference_names():
        return _read(FOLDER / f"{name_or_path}.json")
    path = Path(name_or_path)
    if path.is_file():
        return _read(path)
    names = reference_names()
    raise ConfigError(
        f"no machine and no file is called {name_or_path!r}{nearest(name_or_path, names)}",
        hint=f"known machines: {', '.join(names)}; or a file of fiddler calibrate --output",
    )


def reference_for(hardware: Hardware) -> ReferenceMachine:
    """The shipped machine with the same GPU, or else the usual one."""
    known = map(find_machine, reference_names())
    same = (m for m in known if hardware.has_gpu and m.hardware.gpu_name in hardware.gpu_name)
    return next(same, None) or find_machine(DEFAULT)


def record_of(machine: ReferenceMachine) -> dict[str, Any]:
    """As a file holds it."""
    return {
        "format": FORMAT,
        "name": machine.name,
        "origin": machine.origin,
        "hardware": asdict(machine.hardware),
        "rates": to_json(machine.rates),
    }


def machine_of(record: Any) -> ReferenceMachine:
    """The inverse; ValueError for what is no such record."""
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise ValueError(f"it is no machine of format {FORMAT}")
    try:
        hardware = dict(record["hardware"])
        capability = hardware.get("gpu_capability")
        hardware["gpu_capability"] = tuple(capability) if capability else None
        rates = from_json(record["rates"])
        check_kernels(rates)
        return ReferenceMachine(
            name=str(record["name"]),
            origin=str(record["origin"]),
            hardware=_checked(Hardware(**hardware), rates),
            rates=rates,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"its fields are not those of a machine ({error})") from error


def check_kernels(rates: MachineRates) -> None:
    """ValueError where times are missing of a kernel that a plan may need."""
    for codes, activations in NEEDED:
        rates.expert_s(codes, activations, 1)


def _checked(hardware: Hardware, rates: MachineRates) -> Hardware:
    ram = (hardware.ram_total_bytes, hardware.ram_available_bytes)
    vram = (hardware.vram_total_bytes, hardware.vram_free_bytes, hardware.cuda_context_bytes)
    if not all(type(size) is int and size >= 0 for size in (*ram, *vram)):
        raise ValueError("sizes of memory must be whole numbers")
    capability = hardware.gpu_capability
    if capability and [type(number) for number in capability] != [int, int]:
        raise ValueError("its GPU's capability must be two whole numbers")
    if type(hardware.physical_cores) is not int or hardware.physical_cores < 1:
        raise ValueError(f"it must have a core or more, not {hardware.physical_cores!r}")
    if hardware.has_gpu is not rates.has_gpu:
        raise ValueError("its hardware and its rates do not agree about a GPU")
    return hardware


def _read(path: Path) -> ReferenceMachine:
    try:
        return machine_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be used as a machine: {error}",
            hint="make one with fiddler calibrate --output FILE",
        ) from error
