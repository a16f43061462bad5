"""Cores, nodes and limits, read from pretend trees of the kernel's files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.topology import (
    Machine,
    bytes_of_size,
    cores,
    cores_of_quota,
    num_cores,
    numbers_of_list,
    read_cache_bytes,
    read_machine,
    spread,
)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def two_nodes_with_hyper_threads(root: Path) -> set[int]:
    """8 cores: 0-3 on node 0, 4-7 on node 1; CPU n + 8 is the second thread of core n."""
    for cpu in range(16):
        write(
            root,
            f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list",
            f"{cpu % 8},{cpu % 8 + 8}",
        )
        for index, (level, size) in enumerate(((1, "32K"), (3, "16M"))):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            write(root, f"{folder}/level", str(level))
            write(root, f"{folder}/size", size)
            write(root, f"{folder}/shared_cpu_list", f"node{cpu % 8 // 4}" if level == 3 else "")
    for node, cpus in enumerate(("0-3,8-11", "4-7,12-15")):
        write(root, f"sys/devices/system/node/node{node}/cpulist", cpus)
    return set(range(16))


def desktop_with_small_cores(root: Path) -> set[int]:
    """2 fast cores of two threads (0-1, 2-3) and 4 small ones (4-7)."""
    for cpu in range(8):
        first = cpu // 2 * 2
        threads = f"{first}-{first + 1}" if cpu < 4 else str(cpu)
        write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", threads)
    write(root, "sys/devices/cpu_atom/cpus", "4-7")
    return set(range(8))


def test_threads_go_to_both_nodes_in_turn_and_to_no_core_twice(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, two_nodes_with_hyper_threads(tmp_path))
    assert cores(machine) == list(range(8))
    assert num_cores(machine) == 8
    assert spread(machine, 6) == [3, 7, 2, 6, 1, 5]
    assert read_cache_bytes(tmp_path, set(range(16))) == 2 * 16 * 2**20


def test_fast_cores_go_first(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, desktop_with_small_cores(tmp_path))
    assert cores(machine) == [0, 2, 4, 5, 6, 7]
    assert spread(machine, 4) == [2, 0, 7, 6]


def test_only_allowed_cpus_count(tmp_path: Path) -> None:
    two_nodes_with_hyper_threads(tmp_path)
    machine = read_machine(tmp_path, {1, 9, 10, 15})  # both threads of core 1, one of 2 and of 7
    assert cores(machine) == [1, 10, 15]
    assert spread(machine, 1) == [10]


def test_without_cores_to_spare_nothing_is_pinned(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, two_nodes_with_hyper_threads(tmp_path))
    assert all(spread(machine, num_threads) is None for num_threads in (7, 8, 9, 99))


def test_a_quota_limits_the_cores_and_forbids_pinning(tmp_path: Path) -> None:
    allowed = two_nodes_with_hyper_threads(tmp_path)
    write(tmp_path, "proc/self/cgroup", "1:cpu:/old\n0::/pods/ours")
    write(tmp_path, "sys/fs/cgroup/pods/ours/cpu.max", "max 100000")
    write(tmp_path, "sys/fs/cgroup/pods/cpu.max", "350000 100000")
    machine = read_machine(tmp_path, allowed)
    assert num_cores(machine) == 3
    assert spread(machine, 2) is None


def test_a_machine_without_files_has_a_core_for_each_cpu(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, {0, 1, 5})
    assert cores(machine) == [0, 1, 5]
    assert num_cores(machine) == 3
    assert spread(machine, 1) == [5]
    assert read_cache_bytes(tmp_path, {0}) == 0


def test_this_machine() -> None:
    machine = read_machine()
    assert 1 <= num_cores(machine) <= len(machine.core_of)
    assert set(cores(machine)) <= set(machine.core_of)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    threads, num_nodes = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    num = draw(st.integers(1, 24))
    allowed = draw(st.sets(st.integers(0, num * threads - 1), min_size=1))
    return Machine(
        core_of={cpu: cpu % num for cpu in allowed},
        node_of={cpu: cpu % num % num_nodes for cpu in allowed},
        capacity_of=dict.fromkeys(allowed, 1024),
        quota_cores=None,
    )


@given(machines(), st.integers(1, 24))
def test_pinned_threads_have_a_core_each_and_even_nodes(machine: Machine, num_threads: int) -> None:
    cpus = spread(machine, num_threads)
    if cpus is None:
        assert num_threads > len(cores(machine)) - 2
        return
    assert len(cpus) == num_threads
    assert len({machine.core_of[cpu] for cpu in cpus}) == num_threads
    room = dict.fromkeys(machine.node_of.values(), 0)
    for cpu in cores(machine):
        room[machine.node_of[cpu]] += 1
    used = {node: sum(machine.node_of[cpu] == node for cpu in cpus) for node in room}
    for node in room:  # as many as the fullest other node, but for one, unless it is full
        assert used[node] >= min(room[node], max(used.values()) - 1)


@given(st.sets(st.integers(0, 300)))
def test_lists_of_cpus(cpus: set[int]) -> None:
    assert set(numbers_of_list(",".join(map(str, sorted(cpus))))) == cpus
    runs = ",".join(f"{cpu}-{cpu}" for cpu in cpus)
    assert set(numbers_of_list(runs)) == cpus


def test_ranges_of_cpus() -> None:
    assert list(numbers_of_list("0-2,8\n")) == [0, 1, 2, 8]
    assert list(numbers_of_list("\n")) == []


@pytest.mark.parametrize(
    ("cpu_max", "limit"),
    [("max 100000\n", None), ("250000 100000\n", 2), ("50000 100000\n", 1)],
)
def test_a_containers_quota_counts(cpu_max: str, limit: int | None) -> None:
    assert cores_of_quota(cpu_max) == limit


def test_sizes_of_caches() -> None:
    assert [bytes_of_size(size) for size in ("36608K", "2M", "1G", "512")] == [
        *(36608 * 2**10, 2 * 2**20, 2**30, 512)
    ]
