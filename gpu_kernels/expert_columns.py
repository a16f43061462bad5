"""The right operand of the experts' products: a step of the depth of some columns.

Shapes: N columns (tokens or pairs), D depth of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_columns(x_ptr, x_offset_N, is_used_N, first, SIZE: tl.constexpr, SPEC: tl.constexpr):
    """Depth ``first .. first + SIZE`` of each column, ``[N, SIZE]``; 0 beyond the matrix."""
    DEPTH: tl.constexpr = SPEC.depth
    d_D = first + tl.arange(0, SIZE)
    mask_ND = is_used_N[:, None]
    if SPEC.is_ragged:
        mask_ND = mask_ND & (d_D < DEPTH)[None, :]
    return tl.load(x_ptr + x_offset_N[:, None] + d_D[None, :], mask=mask_ND, other=0.0)
