"""Experts that change places: at every moment each is complete where the tables say."""

import numpy as np
import pytest
import torch

from cpu_kernels.weight_kind import WeightKind, parse_kind
from offload.adaptive import Swap
from offload.swaps import Swaps
from tests.offload.swap_store import MOE_LAYERS, E, check, make_store, random_swaps

KINDS = [None, parse_kind("w4g32z")]
CPU = torch.device("cpu")
RESIDENT = ({0, 3}, {1, 2, 4, 5}, {5})


def test_a_swap_takes_two_moves() -> None:
    store = make_store(CPU, *RESIDENT)
    swaps, at = Swaps(store, CPU), store[1]
    assert swaps.idle_layers == [1, 2, 3]
    swaps.start([Swap(1, comes=4, leaves=3)])
    check(store)
    row = int(at.row_E[4])
    assert swaps.idle_layers == [2, 3] and swaps.version == 0 and row >= 0
    swaps.advance()
    check(store)
    assert swaps.version == 1 and at.slot_E[3] == 1 and at.slot_E[4] == 2 and at.row_E[4] == -1
    swaps.advance()
    check(store, is_settled=True)
    assert swaps.idle_layers == [1, 2, 3] and swaps.version == 2
    assert at.slot_E[3] == -1 and at.row_E[3] == row and at.slot_E[4] == 2
    swaps.advance()
    assert swaps.version == 2
    swaps.start([Swap(1, comes=3, leaves=0)])  # the slot that is free now
    swaps.settle()
    check(store, is_settled=True)
    assert at.slot_E[3] == 1 and at.row_E[0] >= 0


def test_a_layer_on_one_side_has_no_spare() -> None:
    store = make_store(CPU, set(), set(range(E)), {2})
    assert [len(store[layer].gpu_w2_SHI) for layer in MOE_LAYERS] == [0, E, 2]
    assert Swaps(store, CPU).idle_layers == [3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_whatever_moves_every_expert_is_somewhere(seed: int, kind: WeightKind | None) -> None:
    rng = np.random.default_rng(seed)
    store = make_store(CPU, *RESIDENT, kind=kind)
    counts = [int((store[layer].slot_E >= 0).sum()) for layer in MOE_LAYERS]
    swaps = Swaps(store, CPU)
    for step in range(30):
        swaps.advance()
        check(store)
        swaps.start(random_swaps(rng, store, swaps.idle_layers))
        check(store)
        if step % 11 == 10:
            swaps.settle()
            check(store, is_settled=True)
            assert [int((store[layer].slot_E >= 0).sum()) for layer in MOE_LAYERS] == counts
    assert swaps.version > 10


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_beside_other_work(kind: WeightKind | None) -> None:
    """Copies run on their own stream while the current one is busy with products."""
    device = torch.device("cuda")
    rng = np.random.default_rng(0)
    store = make_store(device, *RESIDENT, kind=kind)
    swaps = Swaps(store, device)
    square = torch.randn(2048, 2048, device=device)
    for _ in range(50):
        swaps.advance()
        check(store)
        swaps.start(random_swaps(rng, store, swaps.idle_layers))
        for _ in range(5):
            square = torch.nn.functional.normalize(square @ square)
        torch.cuda.current_stream().synchronize()
    swaps.settle()
    check(store, is_settled=True)
    print(f"{swaps.version} versions of the tables, pinned {store[1].cpu_w2_CHI.is_pinned()}")
    store.clear()
