"""A few tokens times a matrix of the dense layers: the weights are read once, and ahead of time.

A program holds some rows of the weights in registers, asked for before it waits for the kernel that
makes the tokens: where that one leaves memory idle, as attention of a short context and the wait
for the CPU do, the weights have come when it is done. Shapes: T tokens, K depth, N rows of the
weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.dependent_launch import dependent, let_next_start, wait_for_last
from gpu_kernels.whole_numbers import cdiv, next_power_of_2

MAX_TOKENS = 2  # with four torch's product is faster: 1.15 times, over four models' matrices
MAX_DEPTH = 8192
TILE = 8192  # weights that a program holds: 32 registers a thread


def fits_few_rows(x_TK: Tensor) -> bool:
    """Whether :func:`few_rows_linear` is for such tokens; torch is faster with float32."""
    num_tokens, depth = x_TK.shape
    return num_tokens <= MAX_TOKENS and depth <= MAX_DEPTH and x_TK.dtype != torch.float32


def few_rows_linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return ``x @ w.T + bias``, ``[T, N]`` of x's dtype, for up to MAX_TOKENS tokens.

    Sums are float32, and a token's depend on nothing but that token. ``x_TK`` has rows of
    contiguous numbers, ``w_NK`` is contiguous and of the same dtype. Weights and bias must not have
    been written by the last kernel before this one. Safe in a CUDA graph.
    """
    (num_tokens, depth), rows = x_TK.shape, len(w_NK)
    assert num_tokens <= MAX_TOKENS and depth <= MAX_DEPTH
    assert w_NK.shape == (rows, depth) and w_NK.is_contiguous()
    assert x_TK.dtype == w_NK.dtype and x_TK.stride(1) == 1 and x_TK.device == w_NK.device
    assert bias_N is None or (bias_N.shape == (rows,) and bias_N.is_contiguous())
    out_TN = torch.empty((num_tokens, rows), dtype=x_TK.dtype, device=x_TK.device)
    if num_tokens == 0:
        return out_TN
    block_k = next_power_of_2(depth)
    block_n = min(TILE // block_k, next_power_of_2(rows))
    _linear_kernel[(cdiv(rows, block_n),)](
        x_TK,
        w_NK,
        bias_N,
        out_TN,
        x_TK.stride(0),
        rows,
        depth,
        NUM_TOKENS=num_tokens,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **dependent(x_TK.device),
        num_warps=4,
    )
    return out_TN


def few_rows_reference(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The same in float64, rounded once."""
    out_TN = x_TK.double() @ w_NK.double().T
    if bias_N is not None:
        out_TN += bias_N.double()
    return out_TN.to(x_TK.dtype)


@triton.jit
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    stride_x,
    rows,
    depth,
    NUM_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    is_row_N, is_deep_K = n_N < rows, k_K < depth
    w_NK = tl.load(
        w_ptr + n_N[:, None].to(tl.int64) * depth + k_K[None, :],
        mask=is_row_N[:, None] & is_deep_K[None, :],
        other=0.0,
    )
    bias_N = tl.zeros([n_N.shape[0]], tl.float32)
    if bias_ptr is not None:
        bias_N += tl.load(bias_ptr + n_N, mask=is_row_N, other=0.0)
    wait_for_last(DEPENDENT)
    for token in tl.static_range(NUM_TOKENS):
        x_K = tl.load(x_ptr + token * stride_x + k_K, mask=is_deep_K, other=0.0)
        y_N = tl.sum(w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :], 1) + bias_N
        tl.store(out_ptr + token * rows + n_N, y_N.to(out_ptr.dtype.element_ty), mask=is_row_N)
