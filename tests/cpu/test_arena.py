"""The arena: aligned, zeroed, alive with its views, given back after them."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels import arena as arena_module
from cpu_kernels.arena import (
    HUGE_PAGE,
    Arena,
    huge_bytes_of,
    interleave,
    memory_nodes,
)

MB = 1 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


@pytest.mark.parametrize("nbytes", [1, 4096, HUGE_PAGE, HUGE_PAGE + 1, 5 * MB])
def test_memory_is_aligned_zeroed_and_of_the_size_asked(nbytes: int) -> None:
    arena = Arena(nbytes)
    view = arena.array(np.uint8, (nbytes,))
    assert arena.nbytes == nbytes and arena.address == view.ctypes.data
    assert arena.address % HUGE_PAGE == 0
    assert not view.any()
    view[:] = 255  # all of it may be written
    assert view.min() == 255


def test_views_share_the_memory() -> None:
    arena = Arena(MB)
    matrix = arena.array(np.float32, (4, 8), offset=256)
    matrix[2, 3] = 1.5
    assert arena.array(np.float32, (32,), offset=256)[19] == 1.5
    assert matrix.flags.c_contiguous and matrix.flags.writeable


def test_views_outlive_the_arena() -> None:
    arena = Arena(8 * MB)
    view = arena.array(np.int64, (MB,))
    view[:] = np.arange(MB)
    part = view[1000:2000:3]
    arena.close()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.array(np.int64, (1,))
    del arena, view
    gc.collect()
    others = [Arena(8 * MB).array(np.uint8, (8 * MB,)).fill(7) for _ in range(4)]
    assert len(others) == 4 and np.array_equal(part, np.arange(1000, 2000, 3))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
@pytest.mark.parametrize("by", ["close", "del"])
def test_memory_is_given_back(by: str) -> None:
    before = resident_bytes()
    arena = Arena(64 * MB)
    assert resident_bytes() < before + 16 * MB  # nothing is taken before it is written
    view = arena.array(np.uint8, (64 * MB,))
    view.fill(1)
    assert resident_bytes() > before + 48 * MB
    del view
    if by == "close":
        arena.close()
    else:
        del arena
    assert resident_bytes() < before + 16 * MB


def test_what_does_not_fit_is_refused() -> None:
    arena = Arena(100)
    assert arena.array(np.uint16, (2, 25)).size == arena.array(np.uint8, (0,), offset=100).size + 50
    for dtype, shape, offset in (
        (np.uint8, (101,), 0),
        (np.uint8, (1,), 100),
        (np.uint8, (1,), -1),
        (np.float32, (1,), 2),
        (np.float32, (-1,), 8),
    ):
        with pytest.raises(ValueError, match="of an arena of 100"):
            arena.array(dtype, shape, offset)
    with pytest.raises(ValueError, match="at least one byte"):
        Arena(0)
    for size in (1 << 60, 1 << 70):
        with pytest.raises(MemoryError, match="no room for"):
            Arena(size)


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="no huge pages here")
def test_written_pages_are_huge() -> None:
    arena = Arena(32 * MB)
    assert arena.huge_bytes() == 0
    arena.array(np.uint8, (32 * MB,)).fill(1)
    assert 0 < arena.huge_bytes() <= 32 * MB  # memory in pieces may deny some


def test_huge_bytes_of_the_right_mappings() -> None:
    smaps = """\
00100000-00300000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me ac hg
00400000-00800000 rw-p 00000000 00:00 0    [anon: name]
Rss:                4096 kB
AnonHugePages:      4096 kB
00800000-00a00000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
00a00000-00c00000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
"""
    assert huge_bytes_of(smaps, 0x400000, 0x600000) == 6 * MB
    assert huge_bytes_of(smaps, 0x2000000, 0x600000) == 0


def test_nodes_of_this_machine() -> None:
    assert memory_nodes() == sorted(set(memory_nodes()))


def test_pages_that_cannot_be_spread_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Arena(MB).interleave_error == "" or len(memory_nodes()) > 1
    assert interleave(0, HUGE_PAGE, [0]) == ""
    monkeypatch.setattr(arena_module, "memory_nodes", lambda: [100_000, 100_001])
    arena = Arena(MB)
    arena.array(np.uint8, (MB,)).fill(1)
    assert arena.interleave_error
