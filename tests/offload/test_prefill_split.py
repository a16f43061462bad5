"""The division of cold experts between CPU and link, against all divisions there are."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.prefill_split import CAUTION, GAP_S, TURN_S, cpu_share, rows_ahead

seconds = st.floats(0, 10)
Sides = tuple[float, float, float, float, float]  # slope, copy, ahead, start, result


def end_s(counts: list[int], on_cpu: set[int], sides: Sides) -> float:
    """When the slower side ends; the CPU needs half a second an expert and the slope a token."""
    slope, copy_s, ahead_s, start_s, result_s = sides
    sent = sum(1 for e, count in enumerate(counts) if count and e not in on_cpu)
    link_s = ahead_s + sent * copy_s
    if not on_cpu:
        return link_s
    cpu_s = (
        start_s + (GAP_S if ahead_s else 0) + CAUTION * sum(0.5 + slope * counts[e] for e in on_cpu)
    )
    return TURN_S + max(cpu_s, link_s + result_s)


@given(
    st.lists(st.integers(0, 9), max_size=7),
    st.tuples(seconds, seconds, seconds, seconds, seconds),
)
def test_no_other_division_ends_earlier(counts: list[int], sides: Sides) -> None:
    slope, copy_s, ahead_s, start_s, result_s = sides
    found = cpu_share(
        *(counts, lambda n: 0.5 + slope * n),
        copy_s=copy_s,
        ahead_s=ahead_s,
        start_s=start_s,
        result_s=result_s,
    )
    assert found == sorted(found) and all(counts[e] for e in found)
    routed = [e for e, count in enumerate(counts) if count]
    best_s = min(
        end_s(counts, set(some), sides)
        for size in range(len(routed) + 1)
        for some in itertools.combinations(routed, size)
    )
    assert end_s(counts, set(found), sides) == pytest.approx(best_s)


def test_the_cpu_takes_the_fewest_tokens() -> None:
    found = cpu_share([100, 3, 50, 0, 1, 70], lambda n: n / 10 / CAUTION, copy_s=1.0)
    assert found == [1, 4]


def test_a_share_that_gains_less_than_it_costs_is_not_taken() -> None:
    def share(num_cold: int) -> int:  # Qwen3's experts: 0.17 ms to bring, 0.3 ms on the CPU
        return len(cpu_share([64] * num_cold, lambda n: 0.3e-3, copy_s=0.17e-3))

    assert share(10) == share(20) == 0  # 20 are brought in 3.4 ms; with the CPU's share in 2.4
    assert share(60) > 15


def test_a_link_with_more_to_do_gives_more_to_the_cpu() -> None:
    counts = [128] * 6  # of Mixtral's experts: 6.4 ms to bring, 16.4 ms on the CPU

    def share(ahead_s: float) -> int:
        return len(cpu_share(counts, lambda n: 16.4e-3, copy_s=6.4e-3, ahead_s=ahead_s))

    assert share(0.0) == 1 and share(16e-3) == 2 and share(1.0) == 6


def test_copies_run_ahead_where_experts_will_have_tokens() -> None:
    def ahead(tokens: float, cold: int = 80, slots: int = 56, cpu_s: float = 1e-3) -> int:
        return rows_ahead(tokens, cold, slots, lambda n: cpu_s, copy_s=0.17e-3)

    assert ahead(0.5) == 0
    assert 30 <= ahead(128.0) <= 40  # half of the expected
    assert ahead(128.0, slots=8) == 6 and ahead(128.0, slots=1) == 1
    assert ahead(128.0, cold=0) == 0
    assert ahead(2.0, cpu_s=0.05e-3) <= 12  # the CPU takes most of them


LAYERS, COLD, SLOTS = 48, 83, 56
COPY_S, START_S = 0.17e-3, 0.67e-3  # 9.4 MB at 55 GB/s


def cpu_s(num_tokens: int) -> float:
    return 0.15e-3 + 0.011e-3 * num_tokens


def layer_s(slower: float) -> float:
    """Seconds of a layer, over all: 512 tokens choose 8 of 128 experts, the CPU is ``slower``.

    The link makes one copy after the other into slots that are free again 10 us after each, in
    order; between two layers passes half as much again as is assumed.
    """
    draw = random.Random(1)
    now = link_s = 0.0
    free_s = [0.0] * SLOTS
    under_way: list[float] = []  # when each copy for the layer to come will have arrived

    def send(count: int) -> list[float]:
        nonlocal link_s
        arrivals = []
        for _ in range(count):
            link_s = max(link_s, free_s.pop(0), now) + COPY_S
            arrivals.append(link_s)
        return arrivals

    def compute(arrivals: list[float], done_s: float) -> float:
        for arrived_s in arrivals:
            done_s = max(done_s, arrived_s) + 1e-5
            free_s.append(done_s)
        return done_s

    for layer in range(LAYERS):
        chosen = draw.choices(range(128), k=4096)
        counts = [chosen.count(e) for e in range(len(under_way), COLD)]
        is_last = layer == LAYERS - 1
        ahead = 0 if is_last else rows_ahead(32, COLD, SLOTS, cpu_s, copy_s=COPY_S, start_s=START_S)
        on_cpu = cpu_share(counts, cpu_s, copy_s=COPY_S, ahead_s=ahead * COPY_S, start_s=START_S)
        device_s = compute(under_way, now)
        for _ in range(len(counts) - len(on_cpu)):
            device_s = compute(send(1), device_s)
        under_way = send(ahead)
        workers_s = now + START_S + slower * sum(cpu_s(counts[e]) for e in on_cpu)
        now = max(device_s, workers_s) + 1.5 * GAP_S
    return now / LAYERS


def test_a_simulated_prompt_gains_and_forgives_a_slow_cpu() -> None:
    link_alone_s = COLD * COPY_S
    gains = {slower: link_alone_s / layer_s(slower) for slower in (1.0, 1.2, 1.3, 1.5)}
    assert gains[1.0] > 1.2 and gains[1.2] > 1.15 and gains[1.3] > 1.1 and gains[1.5] > 1, gains
