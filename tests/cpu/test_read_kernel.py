"""A plain read of memory by the pool."""

import numpy as np
import pytest

from cpu_kernels.read_kernel import PAGE_WORDS, read, touch
from cpu_kernels.threads import WorkerPool


@pytest.mark.parametrize("num_words", [0, 1, 7, 2047, 2048, 2049, 100_003])
def test_a_plain_read_reads_every_word_once(num_words: int) -> None:
    arena = np.random.default_rng(num_words).integers(-(2**62), 2**62, num_words)
    with WorkerPool(3) as pool:
        for readers in (1, 2, 3):
            assert read(pool, arena, readers) == np.bitwise_xor.reduce(arena)


def test_a_plain_read_refuses_what_it_cannot_read() -> None:
    arena = np.zeros((8, 8), np.int64)
    with WorkerPool(2) as pool:
        for bad, readers in ((arena.T, 1), (np.zeros(3, np.uint16), 1), (arena, 0), (arena, 3)):
            with pytest.raises(ValueError):
                read(pool, bad, readers)


@pytest.mark.parametrize("num_words", [0, 1, PAGE_WORDS, 10 * PAGE_WORDS, 100_003])
def test_a_touch_writes_to_every_page(num_words: int) -> None:
    arena = np.zeros(num_words, np.int64)
    with WorkerPool(3) as pool:
        touch(pool, arena)
    assert all(arena[at : at + PAGE_WORDS].any() for at in range(0, num_words, PAGE_WORDS))
