"""What a cold expert costs on either side in a step of many tokens, measured once per machine."""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.times import TimeTable, measure_times
from offload.calibration import Calibration, Quantity
from offload.expert_stream import ExpertStream
from offload.prefill_division import PrefillCosts
from offload.units import MIB

# Points and the straight lines through them; the slow way with 256 tokens of a Mixtral expert
# alone takes 0.14 s.
TOKENS = (1, 8, 32, 128, 256)
BUDGET_S = 1.0
# Small experts are measured some at a time, as they come: the first of a layer costs more.
CALL_BYTES = 96 * MIB
MOST_ROUTED = 8


def _table(found: Any) -> TimeTable:
    return TimeTable.from_json(json.dumps(found))


def _seconds(found: Any) -> float:
    if not isinstance(found, float) or not 0 < found < 1e3:
        raise ValueError(f"{found!r} is no number of seconds")
    return found


EXPERT_TIMES = Quantity("expert-times", asdict, _table)
COPY_TIME = Quantity("copy-time", float, _seconds)


def known_costs(
    calibration: Calibration,
    pool: ExpertPool,
    experts: Experts,
    activations: Activations,
    stream: ExpertStream | None,
    layer: int,
) -> PrefillCosts:
    """What is known of these experts, which are ``layer``'s; the first start takes two seconds.

    The CPU is measured while the link is busy, as it will be: both read the same memory. Without a
    ring nothing is ever sent.
    """
    # one stride spans both parts of a packed expert
    expert_bytes = experts.w13_stride + (0 if experts.kind.is_packed else experts.w2_stride)
    routed = max(1, min(MOST_ROUTED, CALL_BYTES // expert_bytes))

    def measure_table() -> TimeTable:
        with stream.kept_busy(layer) if stream is not None else nullcontext():
            return measure_times(
                pool, experts, activations, tokens=TOKENS, routed=routed, budget_s=BUDGET_S
            )

    subject = {
        "weights": experts.kind.name,
        "hidden": experts.hidden,
        "width": experts.width,
    }
    how = {
        "activations": activations,
        "threads": pool.num_threads,
        "tokens": TOKENS,
        "routed": routed,
        "link_is_busy": stream is not None,
    }
    table = calibration.once(EXPERT_TIMES, {**subject, **how}, measure_table)
    if stream is None:
        return costs_of(table, copy_s=math.inf)
    copy_s = calibration.once(COPY_TIME, subject, lambda: stream.seconds_per_expert(layer))
    return costs_of(table, copy_s=copy_s)


def costs_of(table: TimeTable, *, copy_s: float) -> PrefillCosts:
    """The costs that follow from measured times; pure."""
    columns_from = table.switch_over()

    def seconds(count: int) -> float:
        return table.time(count, by_columns=columns_from is not None and count >= columns_from)

    return PrefillCosts(copy_s=copy_s, expert_s=seconds, columns_from=columns_from)
