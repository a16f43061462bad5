"""Reads and writes pinned host memory from kernels, over PCIe, in the order of the current stream.

A copy would do, but copies wait for each other: a small one behind 300 MB of weights that another
stream sends takes 6 ms. Kernels need no copy engine.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.whole_numbers import cdiv

BLOCK = 4096


def read_host(host: Tensor, out: Tensor, *, add: Tensor | None = None) -> Tensor:
    """``out = host + add`` (None: ``host``) for contiguous tensors of one shape and dtype.

    ``host`` is pinned, or on ``out``'s device; it must not change before the stream has come by.
    ``add`` may be ``out``.
    """
    assert host.is_contiguous() and out.is_contiguous()
    assert host.shape == out.shape and host.dtype == out.dtype
    if add is not None:
        assert add.is_contiguous() and add.shape == out.shape and add.device == out.device
        assert add.dtype == out.dtype
    if out.numel() > 0:
        grid = (cdiv(out.numel(), BLOCK),)
        _move_kernel[grid](host, add, out, out.numel(), BLOCK=BLOCK)
    return out


def write_host(values: Tensor, host: Tensor) -> Tensor:
    """``host = values`` in ``host``'s dtype, for contiguous tensors of one shape.

    The host sees it once it has waited for an event that comes later in the stream.
    """
    assert values.is_contiguous() and host.is_contiguous() and values.shape == host.shape
    if host.numel() > 0:
        grid = (cdiv(host.numel(), BLOCK),)
        _move_kernel[grid](values, None, host, host.numel(), BLOCK=BLOCK)
    return host


def read_host_reference(host: Tensor, *, add: Tensor | None = None) -> Tensor:
    """The same in plain torch, where ``add`` is, or on the host."""
    return host if add is None else host.to(add.device) + add


@triton.jit
def _move_kernel(in_ptr, add_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_B = i_B < size
    value_B = tl.load(in_ptr + i_B, mask=mask_B, other=0)
    if add_ptr is not None:
        value_B += tl.load(add_ptr + i_B, mask=mask_B, other=0)
    tl.store(out_ptr + i_B, value_B.to(out_ptr.dtype.element_ty), mask=mask_B)
