"""Kernels that read host memory, against torch."""

import pytest
import torch
from paged_batch import DEVICE

from gpu_kernels.host_memory import BLOCK, read_host, read_host_reference, write_host


def on_host(*shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.pin_memory() if DEVICE == "cuda" else values


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 5), (3, BLOCK), (2 * BLOCK + 3,)])
@pytest.mark.parametrize("adds", [False, True])
def test_equals_torch(shape: tuple[int, ...], adds: bool) -> None:
    host = on_host(*shape)
    add = torch.full(shape, 0.5, device=DEVICE) if adds else None
    out = torch.full(shape, float("nan"), device=DEVICE)
    assert read_host(host, out, add=add) is out
    assert torch.equal(out.cpu(), read_host_reference(host, add=add).cpu())


@pytest.mark.parametrize("shape", [(0,), (7, 5), (2 * BLOCK + 3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_writes_convert(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape).to(DEVICE, dtype)
    host = torch.full_like(on_host(*shape), float("nan"))
    host = host.pin_memory() if DEVICE == "cuda" else host
    assert write_host(values, host) is host
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, values.float().cpu())


def test_integers_and_sums_in_place() -> None:
    ids = torch.arange(-3, 90, dtype=torch.int32)
    ids = ids.pin_memory() if DEVICE == "cuda" else ids
    assert torch.equal(read_host(ids, torch.empty_like(ids, device=DEVICE)).cpu(), ids)
    host, total = on_host(4, 9), torch.ones(4, 9, device=DEVICE)
    read_host(host, total, add=total)
    assert torch.equal(total.cpu(), host + 1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError):
        read_host(on_host(4, 4), torch.empty(4, 5, device=DEVICE))
    with pytest.raises(AssertionError):
        read_host(on_host(4, 4), torch.empty(4, 4, device=DEVICE, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.alone
def test_a_small_read_passes_a_large_copy_on_the_gpu() -> None:
    """What the kernel is for; prints how long each way waits behind 256 MB of copies."""
    weights = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    small = torch.arange(128, dtype=torch.int32).pin_memory()
    out = torch.zeros(128, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    read_host(small, out)
    times = {}
    for name in ("copy", "kernel"):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.cuda.stream(side):
            there.copy_(weights, non_blocking=True)
        if name == "copy":
            out.copy_(small, non_blocking=True)
        else:
            read_host(small, out)
        end.record()
        torch.cuda.synchronize()
        times[name] = begin.elapsed_time(end)
    print(f"128 numbers behind 256 MB of copies, ms: {times}")
    assert torch.equal(out.cpu(), small)
    assert times["kernel"] < 2.0, times
