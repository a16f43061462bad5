"""A program's part of the depth, where several programs share the rows of an expert's matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_of_depth(split, begin, UNIT: tl.constexpr, SPEC: tl.constexpr):
    """Return where part ``split`` of ``SPEC.splits`` begins and its length, in units of ``UNIT``.

    Parts are whole steps, of which the last may end beyond the depth. What is divided begins at
    ``begin``, a multiple of ``UNIT``; None: at 0.
    """
    DEPTH: tl.constexpr = SPEC.depth
    STEP: tl.constexpr = SPEC.step
    SPLIT_STEP: tl.constexpr = STEP * SPEC.splits
    if begin is None:
        length = (DEPTH + SPLIT_STEP - 1) // SPLIT_STEP * (STEP // UNIT)
        return split * length, length
    else:
        length = (DEPTH - begin + SPLIT_STEP - 1) // SPLIT_STEP * (STEP // UNIT)
        return begin // UNIT + split * length, length
