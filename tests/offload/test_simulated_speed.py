"""What played steps would take: the planner's own prediction where chances are certain, and copies
counted by hand.

S steps, M layers.
"""

from dataclasses import replace

import numpy as np
import pytest

from fiddler.models.dtypes import resolve_dtypes
from fiddler.models.shapes import load_shape
from fiddler.speed import bare_demand
from offload.chances import LayerChances
from offload.limits import GIGA
from offload.policies import Played
from offload.prediction import predict_decode
from offload.reference_machines import find_machine
from offload.simulated_speed import predict_played

RATES = find_machine("h200-16core").rates
CONFIG = load_shape("qwen2-57b-a14b")  # which has a shared expert
DEMAND = bare_demand(CONFIG, resolve_dtypes("auto", CONFIG.dtype, has_gpu=True))
M = CONFIG.num_layers


def played(reads: int, hits: int, *, loaded: int = 0, moved: int = 0, steps: int = 3) -> Played:
    """As many of each in every layer of every step; ``moved`` in each step."""
    number_SM = np.ones((steps, M), np.int64)
    return Played(*(number_SM * n for n in (reads, hits, loaded)), np.full(steps, moved))


def seconds(of: Played, *, rows: int = 1, is_all_resident: bool = False) -> float:
    return predict_played(
        of, DEMAND, RATES, rows=rows, depth=1024, is_all_resident=is_all_resident
    ).seconds


def planned(hot: int, cold: int, *, rows: int = 1) -> float:
    """The planner's prediction where every layer reads just those."""
    certain = LayerChances((1.0,) * hot, (1.0,) * cold)
    demand = replace(DEMAND, layers=(certain,) * M)
    return predict_decode(demand, RATES, rows=rows, depth=1024).seconds


@pytest.mark.parametrize(("hot", "cold", "rows"), [(5, 3, 1), (0, 8, 1), (30, 21, 16)])
def test_what_is_certain_takes_what_a_plan_says(hot: int, cold: int, rows: int) -> None:
    mine = seconds(played(hot + cold, hot), rows=rows)
    assert mine == pytest.approx(planned(hot, cold, rows=rows))


def test_workers_are_asked_also_where_nothing_misses() -> None:
    everything = seconds(played(8, 8), is_all_resident=True)
    assert everything == pytest.approx(planned(8, 0))
    assert seconds(played(8, 8)) == pytest.approx(everything + M * RATES.hand_over_s)


def test_steps_are_averaged() -> None:
    """A step of many misses is not made up for by one without."""
    every, none = played(8, 0, steps=1), played(8, 8, steps=1)
    both = Played(*(np.concatenate(pair) for pair in zip(every, none, strict=True)))
    assert seconds(both) == pytest.approx((seconds(every) + seconds(none)) / 2)
    assert seconds(both) > 1.05 * seconds(played(8, 4))


def test_what_is_brought_waits_for_the_link() -> None:
    """Beside residents that take less, and is computed then."""
    size = DEMAND.expert_bytes / GIGA
    brought_s = 3 * size * (1 / RATES.peaks.pcie_gbps + 1 / (0.95 * RATES.peaks.gpu_read_gbps))
    shared_s = DEMAND.shared_bytes / GIGA / (0.95 * RATES.peaks.gpu_read_gbps)
    without = seconds(played(0, 0)) - M * shared_s
    assert seconds(played(8, 5, loaded=3)) == pytest.approx(without + M * brought_s)


def test_swaps_take_the_link_one_way_at_a_time() -> None:
    swap_s = DEMAND.expert_bytes / GIGA / RATES.peaks.pcie_gbps
    more_s = seconds(played(8, 5, moved=4)) - seconds(played(8, 5))
    assert more_s == pytest.approx(2 * swap_s)
