"""What findings of ``fiddler doctor`` cost in tokens a second: two predictions for each.

This machine's own rates were measured with what is wrong: they are those of now, and mended ones
are better. Those of another machine were measured in order: they are the mended ones.
"""

from collections.abc import Sequence
from dataclasses import replace

from cpu_kernels.isa import VARIABLE as FORCED_ISA
from fiddler._version import __version__
from fiddler.advice import Case, Planned, make
from fiddler.cli.doctor_problem import Cost, Mend, Problem
from fiddler.config import EngineConfig
from fiddler.errors import FiddlerError
from fiddler.models.shapes import load_shape
from fiddler.speed import RatesHere, demand_of, predict_speeds
from offload.calibration import Calibration, default_path
from offload.hardware import Hardware
from offload.machine_facts import settings_of, this_machine
from offload.machine_rates import RATES, ExpertTimes, MachineRates

SHAPES = ("qwen3-30b-a3b", "olmoe-1b-7b")  # the first one that memory holds


def with_costs(
    problems: Sequence[Problem], hardware: Hardware, used: RatesHere, whole: MachineRates | None
) -> list[Problem]:
    """The same, each with its cost where that can be told.

    ``whole``: this machine's rates with all instructions that its CPU has, where it has them.
    """
    return [
        replace(one, cost=None if one.mend is None else cost_of(one.mend, hardware, used, whole))
        for one in problems
    ]


def cost_of(
    mend: Mend, hardware: Hardware, used: RatesHere, whole: MachineRates | None = None
) -> Cost | None:
    """Of the first shape that would need no disk; None where none can be planned for."""
    rates = _rates(mend, used, whole)
    if rates is None:
        return None
    free = _with_more(hardware, mend)
    for shape in SHAPES:
        try:
            now, then = (_planned(shape, machine, used) for machine in (hardware, free))
        except FiddlerError:
            continue
        is_told = then.plan.cached is None and (now.plan.cached is None or used.rates.disk_gbps)
        if is_told:
            return _compared(shape, (now, then), rates)
    return None


def _rates(
    mend: Mend, used: RatesHere, whole: MachineRates | None
) -> tuple[MachineRates, MachineRates] | None:
    """Those of now and those of the mended machine; None where either is unknown."""
    if mend.all_instructions:
        return None if used.name or whole is None else (used.rates, whole)
    if used.name:
        return mended_rates(used.rates, _undone(mend)), used.rates
    return used.rates, mended_rates(used.rates, mend)


def whole_rates(hardware: Hardware) -> MachineRates | None:
    """What a calibration without FIDDLER_ISA has found here, if there was one."""
    machine = this_machine(hardware, __version__)
    facts = {name: fact for name, fact in machine.hardware.items() if name != FORCED_ISA}
    calibration = Calibration(default_path(), replace(machine, hardware=facts))
    return calibration.known(RATES, settings_of(hardware))


def _with_more(hardware: Hardware, mend: Mend) -> Hardware:
    return replace(
        hardware,
        vram_free_bytes=hardware.vram_free_bytes + mend.vram_bytes,
        ram_available_bytes=hardware.ram_available_bytes + mend.ram_bytes,
    )


def _planned(shape: str, hardware: Hardware, used: RatesHere) -> Planned:
    settings = EngineConfig(model=shape)
    model = load_shape(shape)
    return make(
        Case(settings=settings, model=model, hardware=hardware, name=shape, folder=None, used=used)
    )


def _compared(
    shape: str, plans: tuple[Planned, Planned], rates: tuple[MachineRates, MachineRates]
) -> Cost:
    """Plans stay as they are: what is mended is the machine below them."""
    (decode, prefill), (mended_decode, mended_prefill) = map(_tokens_per_s, plans, rates)
    return Cost(
        shape=shape,
        machine=plans[0].case.used.name or "this machine",
        decode=decode,
        mended_decode=mended_decode,
        prefill=prefill,
        mended_prefill=mended_prefill,
    )


def _tokens_per_s(made: Planned, rates: MachineRates) -> tuple[float, float]:
    """Written and read."""
    demand = demand_of(made.case.model, made.question.dtypes, made.plan)
    asked = {"num_tokens": made.speeds.num_tokens, "rows": made.speeds.rows}
    speeds = predict_speeds(demand, replace(made.case.used, rates=rates), **asked)
    return speeds.decode_rate, speeds.prefill_rate


def _undone(mend: Mend) -> Mend:
    """What :func:`mended_rates` takes back by."""
    return Mend(link=1 / mend.link, memory=1 / mend.memory, hand_over_s=-mend.hand_over_s)


def mended_rates(rates: MachineRates, mend: Mend) -> MachineRates:
    """The rates of the machine once it is mended."""
    link, memory, peaks = mend.link, mend.memory, rates.peaks
    return replace(
        rates,
        peaks=replace(
            peaks,
            cpu_read_gbps=peaks.cpu_read_gbps * memory,
            joint_gbps=peaks.joint_gbps * memory,
            pcie_gbps=peaks.pcie_gbps * link,
        ),
        times=tuple(_sooner(times, memory) for times in rates.times),
        pull_gbps=rates.pull_gbps * link,
        beside_cpu_gbps=rates.beside_cpu_gbps * memory,
        beside_pull_gbps=rates.beside_pull_gbps * link,
        hand_over_s=max(0.0, rates.hand_over_s - mend.hand_over_s),
        shared=tuple(
            replace(one, cpu_gbps=one.cpu_gbps * memory, link_gbps=one.link_gbps * link)
            for one in rates.shared
        ),
    )


def _sooner(times: ExpertTimes, factor: float) -> ExpertTimes:
    table = times.table
    rows_s = tuple(seconds / factor for seconds in table.rows_s)
    columns_s = table.columns_s and tuple(seconds / factor for seconds in table.columns_s)
    return replace(times, table=replace(table, rows_s=rows_s, columns_s=columns_s))
