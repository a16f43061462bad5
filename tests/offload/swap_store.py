"""A small store with spare slots, and what must hold of it whatever moves.

E experts of each of LAYERS layers, H hidden.
"""

import numpy as np
import torch

from offload.adaptive import Swap
from offload.expert_store import ExpertShape, ExpertStore
from offload.placement import Placement

E, H, WIDTH, LAYERS = 6, 16, 32, 4
MOE_LAYERS = (1, 2, 3)
SHAPE = ExpertShape(
    num_layers=LAYERS, moe_layers=MOE_LAYERS, num_experts=E, hidden_size=H, expert_size=WIDTH
)


def weights_of(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * layer + expert)
    w13_FH = torch.randn(2 * WIDTH, H, generator=generator) * H**-0.5
    return w13_FH, torch.randn(H, WIDTH, generator=generator) * WIDTH**-0.5


def make_store(device: torch.device, *resident: set[int]) -> ExpertStore:
    store = ExpertStore(
        SHAPE,
        Placement.of([(), *resident]),
        device=device,
        dtype=torch.float32,
        has_spares=True,
    )

    def fill(layer: int, expert: int, w13_FH: torch.Tensor, w2_HI: torch.Tensor) -> None:
        for mine, theirs in zip((w13_FH, w2_HI), weights_of(layer, expert), strict=True):
            mine.copy_(theirs)

    store.fill(fill, num_threads=1)
    for layer in MOE_LAYERS:
        for weights in (store[layer].gpu_w13_SFH, store[layer].gpu_w2_SHI):
            weights[len(set(range(E)) & resident[layer - 1]) :] = float("nan")  # the spare
    return store


def check(store: ExpertStore, *, is_settled: bool = False) -> None:
    """Every expert is where the tables say, once; in a settled store no row is free."""
    for layer in MOE_LAYERS:
        at = store[layer]
        places = np.stack([at.slot_E, at.row_E])
        assert ((places >= 0).sum(axis=0) == 1).all(), places
        for used_E in places:
            used = used_E[used_E >= 0].tolist()
            assert len(set(used)) == len(used)
        for expert in range(E):
            found = store.weights(layer, expert)
            for mine, theirs in zip(found, weights_of(layer, expert), strict=True):
                assert torch.equal(mine.cpu(), theirs), (layer, expert)
            if at.row_E[expert] >= 0:
                assert at.expert_C[at.row_E[expert]] == expert
        if is_settled:
            assert sorted(at.row_E[at.row_E >= 0]) == list(range(len(at.expert_C)))


def random_swaps(rng: np.random.Generator, store: ExpertStore, layers: list[int]) -> list[Swap]:
    """One in some of the layers."""
    swaps = []
    for layer in layers:
        slot_E = store[layer].slot_E
        comes, leaves = np.flatnonzero(slot_E < 0), np.flatnonzero(slot_E >= 0)
        if rng.random() < 0.7:
            swaps.append(Swap(layer, int(rng.choice(comes)), int(rng.choice(leaves))))
    return swaps
