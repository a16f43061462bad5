"""The store: one place for each expert, the same for torch and the kernels, given back whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.expert_store import ExpertShape, ExpertStore
from offload.placement import Placement

SHAPE = ExpertShape(num_layers=3, moe_layers=(0, 2), num_experts=5, hidden_size=3, expert_size=2)
RESIDENT = [(1, 4), (), (0, 1, 2, 3, 4)]
CPU = torch.device("cpu")


def filled(dtype: torch.dtype) -> ExpertStore:
    """All values of expert e in layer l are 10 l + e, exact in both types; those of w2 negative."""
    store = ExpertStore(SHAPE, Placement.of(RESIDENT), device=CPU, dtype=dtype)

    def fill(layer: int, expert: int, w13_FH: torch.Tensor, w2_HI: torch.Tensor) -> None:
        w13_FH.fill_(10 * layer + expert)
        w2_HI.fill_(-10 * layer - expert)

    store.fill(fill, num_threads=2)
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_read_what_was_filled(dtype: torch.dtype) -> None:
    store = filled(dtype)
    experts = store[0].cpu_experts
    assert experts is not None
    assert experts.kind.name == {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    assert (experts.num_experts, experts.hidden, experts.width) == (3, 3, 2)
    w13_CFH, w2_CHI = experts.arrays
    for row, expert in enumerate((0, 2, 3)):
        assert store[0].row_E[expert] == row
        expected = torch.full((4, 3), expert, dtype=dtype)
        assert torch.equal(store.weights(0, expert)[0], expected)
        bits = expected.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy()
        assert np.array_equal(w13_CFH[row].view(bits.dtype), bits)
    assert experts.w13 == w13_CFH.ctypes.data and experts.w2 == w2_CHI.ctypes.data
    assert store[0].cpu_w13_CFH.data_ptr() == experts.w13
    assert store[0].cpu_w2_CHI.data_ptr() == experts.w2


def test_every_expert_has_one_place() -> None:
    store = filled(torch.float32)
    for layer in SHAPE.moe_layers:
        here = store[layer]
        assert ((here.slot_E >= 0) != (here.row_E >= 0)).all()
        for expert in range(SHAPE.num_experts):
            w13_FH, w2_HI = store.weights(layer, expert)
            assert (w13_FH == 10 * layer + expert).all() and (w2_HI == -10 * layer - expert).all()
    assert store[2].cpu_experts is None and len(store[2].cpu_w13_CFH) == 0


MEASURE = """
from pathlib import Path
import torch
from offload.expert_store import ExpertShape, ExpertStore
from offload.placement import Placement

def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

shape = ExpertShape(
    num_layers=2, moe_layers=(0, 1), num_experts=4, hidden_size=1024, expert_size=1024
)
before = resident_pages()
store = ExpertStore(
    shape, Placement.of([(), ()]), device=torch.device("cpu"), dtype=torch.float32
)
store.fill(lambda layer, e, w13, w2: (w13.zero_(), w2.zero_()), num_threads=2)
print((resident_pages() - before) * 4096)
store.clear()
print((resident_pages() - before) * 4096)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_clear_gives_the_memory_back() -> None:
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    full, empty = map(int, ran.stdout.split())
    size = 2 * 4 * 3 * 1024 * 1024 * 4
    assert full >= size
    assert empty < size / 8


CACHED = """
from pathlib import Path
import torch
from offload.expert_store import ExpertShape, ExpertStore
from offload.placement import Placement

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

shape = ExpertShape(
    num_layers=2, moe_layers=(0, 1), num_experts=8, hidden_size=1024, expert_size=1024
)
cached = Placement.of([(0, 3), (1, 7)])
(torch.ones(1 << 22) == 1).all()  # torch's threads and kernels
before = resident_bytes()
store = ExpertStore(
    shape, Placement.of([(), ()]), device=torch.device("cpu"), dtype=torch.float32, cached=cached
)
store.fill(lambda layer, e, w13, w2: (w13.fill_(8 * layer + e), w2.fill_(-1)), num_threads=2)
most = resident_bytes() - before
for step in range(40):
    layer, experts = step % 2, sorted({step % 8, 3 * step % 8, 5 * step % 8})
    store.cache.begin(layer, experts)
    store.cache.finish()
    for e in experts:
        w13, w2 = store.weights(layer, e)
        assert (w13 == 8 * layer + e).all() and (w2 == -1).all()
    most = max(most, resident_bytes() - before)
print(most)
del w13, w2  # they keep a layer's memory
store.clear()
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_only_rows_that_are_held_take_memory() -> None:
    """Four of sixteen experts of 12 MiB."""
    command = [sys.executable, "-c", CACHED]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    most, empty = map(int, ran.stdout.split())
    size = 3 * 1024 * 1024 * 4
    assert 4 * size <= most < 5.5 * size
    assert empty < 2 * size
