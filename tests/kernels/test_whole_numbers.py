"""Grids and tile sizes against Triton's own."""

import triton

from gpu_kernels.whole_numbers import cdiv, next_power_of_2


def test_they_are_tritons() -> None:
    for size in (*range(1, 130), 1023, 1024, 1025, 2**31 - 1):
        assert next_power_of_2(size) == triton.next_power_of_2(size)
        for part in (1, 2, 3, 128):
            assert cdiv(size, part) == triton.cdiv(size, part)
    assert cdiv(0, 7) == triton.cdiv(0, 7) == 0
