"""``fiddler doctor``: what makes machines that we do not have slower, by their facts."""

from dataclasses import replace

import pytest
from doctor_machines import CPU_ONLY, GIB, GOOD_LINK, NARROW, WITH_GPU

from fiddler.cli.doctor import facts_rows
from fiddler.cli.doctor_checks import find_problems
from fiddler.cli.doctor_facts import Facts
from fiddler.cli.doctor_memory import Cache
from fiddler.cli.doctor_speed import link_gbps
from offload.link_probe import Link, measure_link

BUSY = replace(GOOD_LINK, copy_gbps=9.0)
HIDDEN = Link(generation=None, width=None, max_generation=None, max_width=None, copy_gbps=9.0)
READ_ONLY = Cache("/c", 0, is_writable=False, variable="NUMBA_CACHE_DIR")
NO_PINS = {"PCIe": "RuntimeError: CUDA error: out of memory"}


@pytest.mark.parametrize(
    ("facts", "what", "todo", "effect"),
    [
        (
            replace(WITH_GPU, link=NARROW),
            "generation 3 x8 under load, generation 4 x16 is possible",
            "x16 slot",
            "at most 8 GB/s instead of 32",
        ),
        (replace(WITH_GPU, link=BUSY), "reach 9.0 of PCIe's 32 GB/s", "other programs", "slower"),
        (
            replace(WITH_GPU, link=None, failures=NO_PINS, memlock_bytes=64 << 10),
            "cannot be pinned: RuntimeError: CUDA error: out of memory (memlock: 64.0 KiB)",
            "memlock=-1",
            "five times as slow",
        ),
        (
            replace(WITH_GPU, gpu=replace(WITH_GPU.gpu, vram_free_bytes=15 * GIB)),
            "9.0 GiB of 24.0 GiB of VRAM are in use by others",
            "nvidia-smi",
            "fewer experts",
        ),
        (
            replace(CPU_ONLY, ram_total_bytes=64 * GIB, ram_available_bytes=20 * GIB),
            "20.0 GiB of 64.0 GiB of RAM are free",
            "close other programs",
            "from disk",
        ),
        (
            replace(CPU_ONLY, memory_nodes=2, allowed_nodes=1),
            "only 1 of 2 memory nodes",
            "--membind",
            "channels",
        ),
        (
            replace(WITH_GPU, gpu_node=1, cpu_nodes=[0]),
            "GPU is at NUMA node 1, the CPUs in use are at 0",
            "--cpunodebind=1",
            "between sockets",
        ),
        (replace(CPU_ONLY, huge_pages="never"), "switched off", "echo madvise", "3 % slower"),
        (
            replace(CPU_ONLY, caches={"CPU kernels": READ_ONLY}),
            "cache of CPU kernels, /c, cannot be written",
            "NUMBA_CACHE_DIR",
            "seconds",
        ),
        (
            replace(WITH_GPU, handoff="hostfunc", handoff_problems={"values": "error 801"}),
            "hand-off by values",
            "driver",
            "30 us",
        ),
        (
            replace(CPU_ONLY, rates_of="h200", why_not_own="it is not calibrated"),
            "rates of this machine: it is not calibrated",
            "fiddler calibrate",
            "by the rates of h200",
        ),
        (
            replace(CPU_ONLY, forced_isa="avx2", is_lesser_isa=True),
            "FIDDLER_ISA=avx2 keeps kernels from what this CPU has",
            "unset FIDDLER_ISA",
            "slower",
        ),
        (
            replace(CPU_ONLY, damaged=["/c/cpu.json cannot be used (why)"]),
            "/c/cpu.json cannot be used (why)",
            "fiddler calibrate, which measures for about a minute and replaces it",
            "anew",
        ),
    ],
)
def test_what_costs_speed_says_how_much(facts: Facts, what: str, todo: str, effect: str) -> None:
    (problem,) = find_problems(facts)
    assert what in problem.what and todo in problem.todo and effect in problem.effect
    assert not problem.is_fatal


@pytest.mark.parametrize(
    "facts",
    [
        replace(WITH_GPU, link=HIDDEN),
        replace(WITH_GPU, link=None),
        replace(WITH_GPU, gpu_node=1, cpu_nodes=[0, 1], memory_nodes=2, allowed_nodes=2),
        replace(CPU_ONLY, huge_pages="madvise", memlock_bytes=64 << 10),
        replace(CPU_ONLY, failures=NO_PINS),
        replace(CPU_ONLY, ram_total_bytes=64 * GIB, ram_available_bytes=40 * GIB),
    ],
)
def test_what_is_in_order_or_unknown_is_no_problem(facts: Facts) -> None:
    assert find_problems(facts) == []


def test_what_a_link_carries() -> None:
    assert link_gbps(5, 16) == pytest.approx(63.0, abs=0.1)
    assert link_gbps(3, 4) == pytest.approx(3.94, abs=0.01)
    assert link_gbps(9, 16) == 0.0


@pytest.mark.gpu
def test_the_link_is_seen_at_work() -> None:
    link = measure_link()
    print(link)
    assert link.copy_gbps > 1
    if link.generation and link.width:
        assert link.copy_gbps < 1.02 * link_gbps(link.generation, link.width)


def test_the_hand_off_is_named_and_what_hinders_a_faster_one() -> None:
    slow = replace(WITH_GPU, handoff="hostfunc", handoff_problems={"values": "CUDA error 801"})
    assert facts_rows(slow)["hand-off"].startswith("hostfunc:")
    assert "hand-off" not in facts_rows(CPU_ONLY)
    (problem,) = find_problems(slow)
    assert "by values does not work: CUDA error 801" in problem.what and not problem.is_fatal
