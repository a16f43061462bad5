"""Every code of an eight-bit cache becomes the float that torch says it is."""

import pytest
import torch
import triton
import triton.language as tl

from gpu_kernels.kv_widen import widen


@triton.jit
def _widen_kernel(code_ptr, out_ptr, DTYPE: tl.constexpr, IN_PLACE: tl.constexpr):
    n = tl.arange(0, 256)
    tl.store(out_ptr + n, widen(tl.load(code_ptr + n), DTYPE, IN_PLACE))


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


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_codes_on_the_gpu(kind: torch.dtype, dtype: torch.dtype, in_place: bool) -> None:
    check(kind, dtype, in_place, "cuda")
