"""Sharing cold experts: the table is the best there is, and sane at its edges."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.loading.weights import cold_share
from fiddler.models.dtypes import resolve_dtypes
from fiddler.models.shapes import load_shape
from offload.cold_share import GIGA, ShareCosts, kept_rows
from offload.machine_rates import PULL_PART, SHARED_PART, STEP_PART, ExpertTimes, SharedRates
from offload.reference_machines import find_machine

QWEN = (768, 3 * 2048 * 768 * 2)  # width and bytes of an expert
MIXTRAL = (14336, 3 * 4096 * 14336 * 2)
PACKED = (768, 2_433_024)


def slower_s(costs: ShareCosts, total: int, width: int, expert_bytes: int, kept: int) -> float:
    """Of the two sides' times for ``total`` rows, of which the workers keep some."""
    sides = [0.0]
    for rows, speed, start_s in (
        (kept, costs.cpu_bytes_per_s, costs.cpu_start_s),
        (total - kept, costs.link_bytes_per_s, costs.link_start_s),
    ):
        if rows:
            sides.append(start_s + expert_bytes * rows / width / speed)
    return max(sides)


@given(
    st.floats(1, 500),
    st.floats(1, 500),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
    st.sampled_from([QWEN, MIXTRAL, PACKED, (100, 1000), (16, 1000)]),
    st.sampled_from([1, 32, 128]),
    st.sampled_from([16, 64]),
)
def test_no_other_share_is_better(
    cpu: float,
    link: float,
    cpu_start: float,
    link_start: float,
    sizes: tuple[int, int],
    group: int,
    unit: int,
) -> None:
    costs = ShareCosts(
        cpu_bytes_per_s=cpu * GIGA,
        link_bytes_per_s=link * GIGA,
        cpu_start_s=cpu_start,
        link_start_s=link_start,
        unit=unit,
    )
    width, _ = sizes
    kept_N = kept_rows(12, *sizes, costs, group)
    assert kept_N.dtype == np.int32 and kept_N.shape == (13,) and kept_N[0] == 0
    parts = [*range(0, width, max(unit, group)), width]
    for n in range(1, 13):
        kept, total = int(kept_N[n]), n * width
        others = [whole * width + part for whole in range(n) for part in parts]
        assert kept in others
        least = min(slower_s(costs, total, *sizes, other) for other in others)
        assert slower_s(costs, total, *sizes, kept) == pytest.approx(least, rel=1e-9)


def shares(sizes: tuple[int, int], *counts: int, group: int = 1) -> list[float]:
    """The part of all rows that the device takes, by the preset."""
    kept_N = kept_rows(max(counts), *sizes, ShareCosts(), group)
    return [1 - int(kept_N[n]) / (n * sizes[0]) for n in counts]


@pytest.mark.parametrize("sizes", [QWEN, MIXTRAL])
def test_the_preset_gives_the_link_a_quarter_and_more(sizes: tuple[int, int]) -> None:
    assert all(0.23 < share < 0.34 for share in shares(sizes, 2, 3, 4, 5, 8, 64))


def test_shares_are_whole_groups_and_worth_a_start() -> None:
    kept_N = kept_rows(8, *PACKED, ShareCosts(), 128)
    assert (kept_N % PACKED[0] % 128 == 0).all() and 0.25 < shares(PACKED, 8, group=128)[0] < 0.38
    assert shares((640, 100_000), 1, 2) == [0, 0]


H200 = find_machine("h200-16core").rates


@pytest.mark.parametrize("codes", ["bf16", "int4", "int8"])
def test_a_shipped_machine_shares_as_steps_were_timed_there(codes: str) -> None:
    """Of seven pairs of rates, in turns, 92 to 100 and 42 GB/s were best there for Qwen3-30B."""
    activations = "int8" if codes != "bf16" else "f32"
    size = 9_437_184 // {"bf16": 1, "int8": 2, "int4": 4}[codes]
    costs = H200.share_costs(codes, activations, size)
    assert costs.cpu_bytes_per_s == pytest.approx(92 * GIGA, rel=0.05)
    assert costs.link_bytes_per_s == pytest.approx(41.4 * GIGA)


@given(st.floats(5, 85), st.floats(1, 100), st.sampled_from([QWEN, MIXTRAL]))
def test_shares_follow_the_machine(cpu: float, link: float, sizes: tuple[int, int]) -> None:
    """Where memory is slower than the kernels are, 94 GB/s."""
    rates = replace(H200, beside_cpu_gbps=cpu, beside_pull_gbps=link)
    costs = rates.share_costs("bf16", "f32", sizes[1])
    kept = kept_rows(64, *sizes, costs)[64] / (64 * sizes[0])
    assert kept == pytest.approx(cpu / (cpu + PULL_PART * link), abs=0.02)
    slower = replace(rates, beside_pull_gbps=link / 2).share_costs("bf16", "f32", sizes[1])
    assert kept_rows(64, *sizes, slower)[64] / (64 * sizes[0]) >= kept


def test_what_was_not_measured_beside_the_other_side_is_taken_alone() -> None:
    rates = replace(H200, beside_cpu_gbps=0.0, beside_pull_gbps=0.0)
    slow = replace(rates, peaks=replace(rates.peaks, cpu_read_gbps=50.0))
    costs = slow.share_costs("bf16", "f32", QWEN[1])
    assert costs.cpu_bytes_per_s == 50 * GIGA and costs.link_bytes_per_s == PULL_PART * 51 * GIGA


def test_rates_that_were_measured_while_sharing_come_first() -> None:
    def shared(kernel: str, size: int, cpu: float, link: float) -> SharedRates:
        return SharedRates(kernel=kernel, expert_bytes=size, cpu_gbps=cpu, link_gbps=link)

    bf16 = shared("bf16/f32", 10_000_000, 90.0, 40.0), shared("bf16/f32", 30_000_000, 110.0, 50.0)
    rates = replace(H200, shared=(*bf16[::-1], shared("w4g128/int8", 5_000_000, 60.0, 0.0)))

    def costs(codes: str, activations: str, size: int) -> ShareCosts:
        return rates.share_costs(codes, activations, size)

    between = costs("bf16", "f32", 20_000_000)
    assert between.cpu_bytes_per_s == pytest.approx(100 * SHARED_PART * GIGA)
    assert between.link_bytes_per_s == pytest.approx(45 * SHARED_PART * GIGA)
    assert costs("bf16", "f32", 1_000) == costs("bf16", "f32", 10_000_000)
    no_link = costs("int4", "int8", 5_000_000)
    assert no_link.cpu_bytes_per_s == pytest.approx(60 * SHARED_PART * GIGA)
    assert kept_rows(8, 768, 5_000_000, no_link, 128)[8] == 8 * 768
    # w8 was not: as bf16, unless its kernel is slower than that
    link = costs("int8", "int8", 30_000_000).link_bytes_per_s
    assert link == pytest.approx(50 * SHARED_PART * GIGA)
    slow = replace(rates, times=tuple(ten_times(one) for one in rates.times))
    alone = slow.expert_s("int8", "int8", 30_000_000)(1, False)
    found = slow.share_costs("int8", "int8", 30_000_000).cpu_bytes_per_s
    assert found == pytest.approx(30_000_000 / (STEP_PART * alone))


def test_no_share_is_faster_than_plain_reads_of_memory() -> None:
    """Which measured layers exceeded: some of their experts were in a cache."""
    one = SharedRates(kernel="bf16/f32", expert_bytes=1, cpu_gbps=150.0, link_gbps=40.0)
    costs = replace(H200, shared=(one,)).share_costs("bf16", "f32", 10_000_000)
    total = costs.cpu_bytes_per_s + costs.link_bytes_per_s
    assert total == pytest.approx(SHARED_PART * H200.peaks.joint_gbps * GIGA)
    assert costs.link_bytes_per_s == pytest.approx(SHARED_PART * 40 * GIGA)


def ten_times(one: ExpertTimes) -> ExpertTimes:
    """As many seconds."""
    longer = {
        name: tuple(10 * s for s in seconds)
        for name in ("rows_s", "columns_s")
        if (seconds := getattr(one.table, name)) is not None
    }
    return replace(one, table=replace(one.table, **longer))


def test_a_loaded_model_shares_by_the_rates_that_it_was_planned_with() -> None:
    for dtype, activations in (("auto", "f32"), ("w4g128", "int8")):
        config = load_shape("qwen3-30b-a3b")
        dtypes = resolve_dtypes(dtype, config.dtype, has_gpu=True, packed=None)
        ground: Any = SimpleNamespace(config=config, dtypes=dtypes, rates=H200)
        (kind,) = dtypes.expert_kinds
        size = QWEN[1] if dtype == "auto" else PACKED[1]
        assert cold_share(ground) == H200.share_costs(kind.codes, activations, size)
