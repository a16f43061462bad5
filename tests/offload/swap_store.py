"""A small store with spare slots, and what must hold of it whatever moves.

E experts of each of LAYERS layers, H hidden.
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch

from cpu_kernels.packed_layout import pack_expert
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import WeightKind
from offload.adaptive import Swap
from offload.expert_store import ExpertShape, ExpertStore
from offload.placement import Placement

E, H, WIDTH, LAYERS = 6, 16, 64, 4
MOE_LAYERS = (1, 2, 3)
SHAPE = ExpertShape(
    num_layers=LAYERS, moe_layers=MOE_LAYERS, num_experts=E, hidden_size=H, expert_size=WIDTH
)


def weights_of(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * layer + expert)
    w13_FH = torch.randn(2 * WIDTH, H, generator=generator) * H**-0.5
    return w13_FH, torch.randn(H, WIDTH, generator=generator) * WIDTH**-0.5


@functools.cache
def parts_of(layer: int, expert: int, kind: WeightKind | None) -> tuple[torch.Tensor, ...]:
    """What the store holds of an expert; ``kind``: of packed ones. Leave them as they are."""
    w13_FH, w2_HI = weights_of(layer, expert)
    if kind is None:
        return w13_FH, w2_HI
    matrices = (round_to_nearest(w.numpy(), kind) for w in (*w13_FH.chunk(2), w2_HI))
    return (torch.from_numpy(pack_expert(kind, *matrices)),)


def make_store(
    device: torch.device,
    *resident: set[int],
    kind: WeightKind | Mapping[int, WeightKind] | None = None,
) -> ExpertStore:
    """``kind``: of packed experts, or each layer's own."""
    store = ExpertStore(
        SHAPE,
        Placement.of([(), *resident]),
        device=device,
        dtype=torch.float32 if kind is None else torch.uint8,
        packed=kind,
        has_spares=True,
    )

    def fill(layer: int, expert: int, *parts: torch.Tensor) -> None:
        own = kind[layer] if isinstance(kind, Mapping) else kind
        for mine, theirs in zip(parts, parts_of(layer, expert, own), strict=True):
            mine.copy_(theirs)

    store.fill(fill, num_threads=1)
    for layer in MOE_LAYERS:
        for part in store[layer].gpu_parts:  # the spare
            part[len(resident[layer - 1]) :] = float("nan") if kind is None else 255
    return store


def check(store: ExpertStore, *, is_settled: bool = False) -> None:
    """Every expert is where the tables say, once; in a settled store no row is free."""
    for layer in MOE_LAYERS:
        at = store[layer]
        kind = None if at.packed is None else at.packed.kind
        places = np.stack([at.slot_E, at.row_E])
        assert ((places >= 0).sum(axis=0) == 1).all(), places
        for used_E in places:
            used = used_E[used_E >= 0].tolist()
            assert len(set(used)) == len(used)
        for expert in range(E):
            for mine, theirs in zip(at.place(expert), parts_of(layer, expert, kind), strict=True):
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
