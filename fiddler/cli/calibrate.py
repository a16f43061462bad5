"""``fiddler calibrate``: how fast this machine is, measured once, for plans and predictions."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fiddler.cli.console import note, output_width
from fiddler.cli.written_file import check_file, write_file
from fiddler.errors import ConfigError
from fiddler.wrapping import fitted, glued, wrapped
from offload.units import counted

if TYPE_CHECKING:
    from offload.machine_rates import MachineRates
    from offload.reference_machines import ReferenceMachine

EXPERTS = "CPU experts, ms for M tokens (the faster of row by row and by columns of tokens)"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the figures for fiddler plan --hardware.",
)
def command(as_json: bool, output: Path | None) -> None:
    """Measure this machine: memory, CPU kernels, PCIe, GPU, disk.

    Takes about a minute and keeps the figures in the user's cache, from which plan and bench
    predict speeds. The machine should have nothing else to do meanwhile.
    """
    from offload.reference_machines import record_of

    if output is not None:
        check_file("--output", output)
    started = time.perf_counter()
    machine = measure()
    note(f"measured in {time.perf_counter() - started:.0f} s")
    text = json.dumps(record_of(machine), indent=1)
    click.echo(text if as_json else "\n".join(lines_of(machine.rates, output_width())))
    if output is not None:
        write_file(output, text + "\n")
    _check_kept(machine, output)


def _check_kept(machine: "ReferenceMachine", output: Path | None) -> None:
    """Say it below all else if the cache has not got the figures; ConfigError if no file has.

    The warning came before the table.
    """
    from offload.calibration import default_path

    if _is_kept(machine):
        return
    said = f"{default_path()} cannot be written: plan and bench will not know these figures"
    fix = "make it writable, or set XDG_CACHE_HOME to a folder of yours"
    if output is None:
        raise ConfigError(said, hint=f"{fix}; or keep them with --output FILE")
    note(f"{said}, {output} has them; {fix}")


def _is_kept(machine: "ReferenceMachine") -> bool:
    from fiddler._version import __version__
    from offload.calibration import Calibration, default_path
    from offload.machine_facts import settings_of, this_machine
    from offload.machine_rates import RATES

    calibration = Calibration(default_path(), this_machine(machine.hardware, __version__))
    return calibration.known(RATES, settings_of(machine.hardware)) == machine.rates


def measure() -> "ReferenceMachine":
    """Measure this machine and keep the figures, telling each step."""
    from cpu_kernels.precompile import precompiling
    from cpu_kernels.thread_count import measured_num_threads
    from fiddler._version import __version__
    from offload.calibration import Calibration, default_path
    from offload.hardware import probe
    from offload.machine_facts import settings_of, this_machine
    from offload.machine_rates import RATES
    from offload.measuring import (
        Setting,
        kernels_to_compile,
        machine_steps,
        measure_rates,
        wake_gpu,
    )
    from offload.reference_machines import ReferenceMachine

    to_compile = kernels_to_compile()
    if to_compile:
        note("compiling CPU kernels, once")
    with precompiling(to_compile):
        hardware = probe()  # the first of CUDA: it knows the size of contexts that it saw come
        if to_compile:
            wake_gpu(hardware)
    # again, without what the compiling processes took of it
    hardware = replace(hardware, ram_available_bytes=probe("cpu").ram_available_bytes)
    setting = Setting(
        hardware=hardware,
        num_threads=measured_num_threads(),
        dtype="bfloat16" if hardware.has_gpu else "float32",
        folder=default_path().parent,
    )
    if not hardware.has_gpu:
        note("no GPU here: nothing of one is measured")
    rates = measure_rates(
        setting, machine_steps(), lambda title, number, of: note(f"{number} of {of}: {title}")
    )
    machine = this_machine(hardware, __version__)
    calibration = Calibration(default_path(), machine)
    calibration.store(RATES, settings_of(hardware), rates)
    return ReferenceMachine(
        name=machine.name,
        origin=f"measured by fiddler {__version__}",
        hardware=hardware,
        rates=rates,
    )


def lines_of(rates: "MachineRates", width: int = sys.maxsize) -> list[str]:
    """The figures in the words of a table; what was not measured is left out or said.

    In lines of ``width``, broken at blanks.
    """
    peaks = rates.peaks
    rows = {
        "CPU reads": f"{peaks.cpu_read_gbps:.1f} GB/s, {counted(rates.num_threads, 'worker')}",
        **_gpu_rows(rates),
        "products": f"{peaks.gemm_tflops:.3g} TFLOP/s",
        "torch on the CPU": (
            f"{rates.call_s * 1e6:.1f} us a call, {rates.cpu_tflops:.3g} TFLOP/s, "
            f"{rates.row_gbps:.1f} GB/s with one row"
        ),
        "disk": f"{rates.disk_gbps:.2f} GB/s" if rates.disk_gbps else _why_no_disk(),
    }
    names = max(map(len, rows))
    lines = [
        line for name, text in rows.items() for line in wrapped(f"{name:<{names}}  ", text, width)
    ]
    titles = fitted("\n".join([*_shared_lines(rates), "", EXPERTS]), width)
    return [*lines, *titles, *_expert_lines(rates, width)]


def _why_no_disk() -> str:
    from offload.calibration import default_path
    from offload.measuring import why_no_disk

    return why_no_disk(default_path().parent)


def _gpu_rows(rates: "MachineRates") -> dict[str, str]:
    peaks = rates.peaks
    if not rates.has_gpu:
        return {"GPU": "none"}
    return {
        "CPU and PCIe": f"{peaks.joint_gbps:.1f} GB/s together",
        "PCIe copies": f"{peaks.pcie_gbps:.1f} GB/s",
        "GPU pulls": f"{rates.pull_gbps:.1f} GB/s alone, {rates.beside_pull_gbps:.1f} beside "
        f"workers that read {rates.beside_cpu_gbps:.1f}",
        "GPU reads": f"{peaks.gpu_read_gbps:,.0f} GB/s",
        "kernels": f"{rates.launch_s * 1e6:.1f} us each in a CUDA graph, "
        f"{rates.python_launch_s * 1e6:.0f} started by Python",
        "hand-over": f"{rates.hand_over_s * 1e6:.1f} us a layer",
    }


def _shared_lines(rates: "MachineRates") -> list[str]:
    if not rates.shared:
        return []
    lines = ["", "Cold experts of a decode step, read by the workers and by the GPU, GB/s"]
    for one in rates.shared:
        name = f"{one.kernel}, {one.expert_bytes / 1e6:.1f} MB"
        lines.append(f"  {name}: {one.cpu_gbps:.1f} and {one.link_gbps:.1f}")
    return lines


def _expert_lines(rates: "MachineRates", width: int) -> list[str]:
    lines: list[str] = []
    for times in rates.times:
        table = times.table
        points = ", ".join(glued(f"{m}: {table.best(m) * 1e3:.3g}") for m in table.tokens)
        when = table.switch_over()
        switch = f"; by columns from {glued(f'M = {when}')}" if when else ""
        name = f"{table.kernel}, {table.hidden} x {table.width}"
        lines += wrapped(f"  {name}: ", f"{points}{switch}", width)
    return lines
