"""How much RAM a plan needs to have no expert on disk, and to be as fast as it can be."""

from dataclasses import replace

from fiddler.advice import Case, Planned, make
from fiddler.planning import candidates
from offload.units import gib_at_least


def without_bound(case: Case, more_ram: int = 0) -> Case:
    """``case`` with no ``--ram-gb``, on a machine with so many bytes more."""
    larger = replace(
        case.hardware,
        ram_total_bytes=case.hardware.ram_total_bytes + more_ram,
        ram_available_bytes=case.hardware.ram_available_bytes + more_ram,
    )
    return replace(case.asking(ram_gb=None), hardware=larger)


def ram_for_all(made: Planned) -> int:
    """Bytes within which the plan has no expert on disk and is as fast as without a bound.

    That plan's own may be too few: it was chosen among others, and a shorter RAM has no ring in
    them and no room for experts to move, as Mixtral's needs 68.7 to 71.1 GiB beside 23.
    """
    every = made.plan.ram_needed_bytes + made.plan.memory.disk_experts
    free = make(without_bound(made.case))
    if is_short := free.plan.cached is not None:  # on this machine: twice the model is enough
        free = make(without_bound(made.case, 2 * (every + made.plan.memory.gpu_experts)))
    layouts = map(free.question.layout, candidates(free.question))
    most = max(layout.ram_needed for layout in layouts if layout.fits)
    figures = [every, free.plan.ram_needed_bytes, most]
    if not is_short:  # without a GPU a bound makes KV smaller: less of a batch runs at once
        figures.append(free.plan.ram_budget_bytes)
    return next((size for size in figures if _is_enough(free, size)), figures[-1])


def _is_enough(free: Planned, ram: int) -> bool:
    """Whether a bound of so many bytes leaves the plan ``free``, made without one, as fast."""
    within = make(free.case.asking(ram_gb=float(gib_at_least(ram))))
    speeds, wanted = within.speeds, free.speeds
    is_as_fast = speeds.decode_rate >= wanted.decode_rate
    is_as_fast &= speeds.prefill_rate >= wanted.prefill_rate
    return is_as_fast and within.plan.spare_slots == free.plan.spare_slots
