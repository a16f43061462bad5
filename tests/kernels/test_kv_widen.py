"""Every code of a cache becomes the number that torch says it is."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from gpu_kernels.kv_quant import dequantise_kv
from gpu_kernels.kv_widen import (
    CODE_UNIT,
    NIBBLE_OFFSET,
    half_as_int8,
    widen,
    widen_half,
    widen_half_pairs,
    zero_and_scale,
)


@triton.jit
def _widen_kernel(code_ptr, out_ptr, DTYPE: tl.constexpr, IN_PLACE: tl.constexpr):
    n = tl.arange(0, 256)
    tl.store(out_ptr + n, widen(tl.load(code_ptr + n), DTYPE, IN_PLACE))


@triton.jit
def _halves_kernel(byte_ptr, out_ptr, int8_ptr, DTYPE: tl.constexpr, IN_PLACE: tl.constexpr):
    n = tl.arange(0, 256)
    byte = tl.load(byte_ptr + n)
    for HIGH in tl.static_range(2):
        tl.store(out_ptr + 256 * HIGH + n, widen_half(byte, DTYPE, HIGH, IN_PLACE))
        tl.store(int8_ptr + 256 * HIGH + n, half_as_int8(byte, HIGH))


@triton.jit
def _pairs_kernel(pair_ptr, out_ptr, HIGH: tl.constexpr, ODD: tl.constexpr, UNIT: tl.constexpr):
    n = tl.arange(0, 128)
    code = widen_half_pairs(tl.load(pair_ptr + n), HIGH, ODD).to(tl.float32) / UNIT
    tl.store(out_ptr + 256 * HIGH + 2 * n + ODD, code - NIBBLE_OFFSET)


@triton.jit
def _zero_and_scale_kernel(word_ptr, out_ptr):
    n = tl.arange(0, 16)
    zero, scale = zero_and_scale(tl.load(word_ptr + n))
    tl.store(out_ptr + 2 * n, zero)
    tl.store(out_ptr + 2 * n + 1, scale)


def all_codes(kind: torch.dtype) -> torch.Tensor:
    """All 256, but for fp8's two NaNs, which are zeros here."""
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    if kind == torch.float8_e4m3fn:
        codes = torch.where(codes.float().isnan(), 0.0, codes.float()).to(kind)
    return codes


def check(kind: torch.dtype, dtype: torch.dtype, in_place: bool, device: str) -> None:
    codes = all_codes(kind).to(device)
    raw = codes.view(torch.uint8) if kind == torch.float8_e4m3fn else codes
    out = torch.full((256,), float("nan"), dtype=dtype, device=device)
    name = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    _widen_kernel[(1,)](raw, out, DTYPE=name[dtype], IN_PLACE=in_place)
    assert torch.equal(out, codes.to(dtype))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_codes(kind: torch.dtype, dtype: torch.dtype) -> None:
    check(kind, dtype, True, "cpu")


def check_halves(dtype: torch.dtype, in_place: bool, device: str) -> None:
    """Of all bytes, in one row and the other, and as neighbours in int16."""
    bytes_ = torch.arange(256, dtype=torch.uint8, device=device)
    zero_and_1 = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, device=device)
    expected = dequantise_kv(bytes_[:, None], zero_and_1).T  # [2, 256], -8..7
    assert expected.aminmax() == (-8, 7)
    out = torch.full((2, 256), float("nan"), dtype=dtype, device=device)
    as_int8 = torch.full((2, 256), 99, dtype=torch.int8, device=device)
    name = {torch.float32: tl.float32, torch.float16: tl.float16}
    _halves_kernel[(1,)](bytes_, out, as_int8, DTYPE=name[dtype], IN_PLACE=in_place)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(as_int8, (expected * 16).to(torch.int8))
    pairs = torch.full((2, 256), float("nan"), device=device)
    for high, odd in itertools.product((False, True), repeat=2):
        unit = CODE_UNIT.value * (16 if high else 1)
        _pairs_kernel[(1,)](bytes_.view(torch.int16), pairs, HIGH=high, ODD=odd, UNIT=unit)
    assert torch.equal(pairs, expected)


def check_zero_and_scale(device: str) -> None:
    pair = torch.randn(16, 2, device=device).to(torch.bfloat16)
    out = torch.full((16, 2), float("nan"), device=device)
    _zero_and_scale_kernel[(1,)](pair.view(torch.int32), out)
    assert torch.equal(out, pair.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_bytes_of_two_codes(dtype: torch.dtype) -> None:
    check_halves(dtype, True, "cpu")


def test_zeros_and_scales() -> None:
    check_zero_and_scale("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_bytes_of_two_codes_on_the_gpu(dtype: torch.dtype, in_place: bool) -> None:
    check_halves(dtype, in_place, "cuda")
    check_zero_and_scale("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_codes_on_the_gpu(kind: torch.dtype, dtype: torch.dtype, in_place: bool) -> None:
    check(kind, dtype, in_place, "cuda")
