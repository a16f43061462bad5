"""A kept kernel is started only for arguments that Triton would compile the same kernel for."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gpu_kernels import grouped_gemm
from gpu_kernels.expert_config import ExpertConfig
from gpu_kernels.expert_grouping import Grouping
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer
from gpu_kernels.grouped_gemm import GroupedWorkspace, grouped_products
from gpu_kernels.grouped_tile import grouped_kernel
from gpu_kernels.tile_spec import TileConfig

TILE = TileConfig(16, 8, 32, num_warps=1, num_stages=2)
T, S = 6, 20
SHIFTS = [
    (0,) * 5,
    *itertools.product((0, 4), repeat=5),
    *((0,) * n + (1,) + (0,) * (4 - n) for n in range(5)),
]


class Compiled:
    """What Triton would have compiled for some arguments, and nothing that runs."""

    def __init__(self, kind: Callable[..., str], *args: Any, **options: Any) -> None:
        self._kind, self.kind, self.num_starts = kind, kind(*args, **options), 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def start(*args: Any) -> None:
            assert len(grid) == 3 and self._kind(*args) == self.kind
            self.num_starts += 1

        return start


class Compiler:
    """In the kernel's place."""

    def __init__(self) -> None:
        kernel = grouped_kernel
        if not isinstance(kernel, JITFunction):  # it is interpreted
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.compiled: list[Compiled] = []

    def _kind(self, *args: Any, **options: Any) -> str:
        return str(self._bind(*args, debug=False, **options)[1])

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        def launch(*args: Any, **options: Any) -> Compiled:
            self.compiled.append(Compiled(self._kind, *args, **options))
            return self.compiled[-1]

        return launch


def shifted(shape: Sequence[int], dtype: torch.dtype, shift: int) -> torch.Tensor:
    """``shift`` elements behind an address that is a multiple of 64 bytes."""
    room = torch.empty(torch.Size(shape).numel() + 64, dtype=dtype)
    first = -room.data_ptr() % 64 // room.itemsize + shift
    return room[first : first + torch.Size(shape).numel()].view(shape)


@pytest.mark.parametrize(("hidden", "width"), [(32, 16), (24, 40), (16, 1)])
def test_kernels_are_kept_by_all_that_triton_looks_at(
    hidden: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(grouped_gemm, "grouped_kernel", compiler)
    w13_SFH, w2_SHI = torch.zeros(S, 2 * width, hidden), torch.zeros(S, hidden, width)
    layer = ExpertLayer(DenseWeights(w13_SFH.half(), w2_SHI.half()))
    steps = itertools.product(
        (torch.float16, torch.float32), (1, 2), (hidden, hidden + 1, hidden + 16), SHIFTS
    )
    for dtype, top_k, stride, (x, act, part, pair, first) in steps:
        x_TH = shifted((T, stride), dtype, x)[:, :hidden]
        ids_TK = torch.zeros(T, top_k, dtype=torch.int32)
        pairs = ids_TK.numel()
        groups = Grouping(
            shifted((pairs,), torch.int32, pair), shifted((S + 17,), torch.int32, first)
        )
        workspace = GroupedWorkspace(
            shifted((pairs, width), dtype, act), shifted((pairs, hidden), dtype, part)
        )
        for first_slot, num_slots in ((0, 4), (1, 1), (16, 16), (0, S)):
            grouped_products(
                *(x_TH, ids_TK, groups, layer, workspace),
                config=ExpertConfig(TILE, TILE),
                first_slot=first_slot,
                num_slots=num_slots,
            )
    assert sum(kernel.num_starts for kernel in compiler.compiled) > len(compiler.compiled)
