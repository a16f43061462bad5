"""The division of cold experts between CPU and link, against all divisions there are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.prefill_split import GAP_S, LinkClock, cpu_share, rows_ahead

seconds = st.floats(0, 10)


def end_s(
    counts: list[int],
    on_cpu: set[int],
    slope: float,
    copy_s: float,
    queued_s: float,
    start_s: float,
) -> float:
    """When the slower side ends; the CPU needs half a second an expert and ``slope`` a token."""
    cpu_s = sum(0.5 + slope * counts[e] for e in on_cpu) + (start_s if on_cpu else 0.0)
    sent = sum(1 for e, count in enumerate(counts) if count and e not in on_cpu)
    return max(cpu_s, queued_s + sent * copy_s)


@given(st.lists(st.integers(0, 9), max_size=7), seconds, seconds, seconds, seconds)
def test_no_other_division_ends_earlier(
    counts: list[int], slope: float, copy_s: float, queued_s: float, start_s: float
) -> None:
    found = cpu_share(
        counts, lambda n: 0.5 + slope * n, copy_s=copy_s, queued_s=queued_s, start_s=start_s
    )
    assert found == sorted(found) and all(counts[e] for e in found)
    sides = (slope, copy_s, queued_s, start_s)
    routed = [e for e, count in enumerate(counts) if count]
    best_s = min(
        end_s(counts, set(some), *sides)
        for size in range(len(routed) + 1)
        for some in itertools.combinations(routed, size)
    )
    assert end_s(counts, set(found), *sides) == pytest.approx(best_s)


def test_the_cpu_takes_the_fewest_tokens() -> None:
    found = cpu_share([100, 3, 50, 0, 1, 70], lambda n: n / 10, copy_s=1.0)
    assert found == [1, 4]


def test_a_busy_link_gives_more_to_the_cpu() -> None:
    counts = [128] * 6  # of Mixtral's experts: 6.4 ms to bring, 16.4 ms on the CPU

    def share(queued_s: float) -> int:
        return len(cpu_share(counts, lambda n: 16.4e-3, copy_s=6.4e-3, queued_s=queued_s))

    assert share(0.0) == 1 and share(12.8e-3) == 2 and share(1.0) == 6


def test_copies_run_ahead_where_experts_will_have_tokens() -> None:
    def ahead(tokens: float, cold: int = 80, slots: int = 56, cpu_s: float = 1e-3) -> int:
        return rows_ahead(tokens, cold, slots, lambda n: cpu_s, copy_s=0.17e-3)

    assert ahead(0.5) == 0
    assert 30 <= ahead(128.0) <= 40  # half of the expected
    assert ahead(128.0, slots=8) == 6 and ahead(128.0, slots=1) == 1
    assert ahead(128.0, cold=0) == 0
    assert ahead(2.0, cpu_s=0.06e-3) <= 12  # the CPU takes most of them


def test_the_clock_counts_what_is_left_of_the_queue() -> None:
    clock = LinkClock()
    clock.pass_layer(own_s=4e-3, ahead_s=12e-3, cpu_s=6e-3)  # the CPU ends 2 ms later
    assert clock.backlog_s == pytest.approx(10e-3 - GAP_S)
    clock.pass_layer(own_s=0.0, ahead_s=0.0, cpu_s=1.0)
    assert clock.backlog_s == 0.0
